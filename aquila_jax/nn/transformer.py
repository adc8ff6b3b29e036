"""The decoder: embedding, scanned layers, head."""

import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from aquila_jax import axes
from aquila_jax.axes import BATCH, VOCAB
from aquila_jax.config import ModelConfig
from aquila_jax.kernels.attention import MIXED
from aquila_jax.nn.attention import CACHE, KEY, QUERY, VALUE, Attention
from aquila_jax.nn.embeddings import embed
from aquila_jax.nn.groups import scanned, scanned_groups
from aquila_jax.nn.layers import GatedMLP, RMSNorm, Rotation, declare, rotation
from aquila_jax.nn.losses import WeightedSum, token_cross_entropy
from aquila_jax.nn.moe import DEFAULT_DISPATCH, ROUTER, Dispatch, MixtureOfExperts
from aquila_jax.nn.vocabulary_chunks import Head, token_losses, token_scores
from aquila_jax.sharding import Layout

# What attention names, and is dear to compute again for its size.
_NAMES = [QUERY, KEY, VALUE, MIXED]

# What the backward pass finds stored of a layer, most first; the rest it computes again.
REMAT_POLICIES: Mapping[str, Callable[..., Any] | None] = types.MappingProxyType(
    {
        "none": None,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "projections": jax.checkpoint_policies.save_only_these_names(*_NAMES),
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=_NAMES,
            offload_src="device",
            offload_dst="pinned_host",
        ),
        "full": jax.checkpoint_policies.nothing_saveable,
    }
)


class Block(nn.Module):
    """One layer: attention, then an MLP or a mixture of experts, each after a norm."""

    config: ModelConfig
    dtype: DTypeLike
    has_experts: bool
    layout: Layout | None = None
    dispatch: Dispatch = DEFAULT_DISPATCH

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        angles: Rotation,
        segment_ids_BT: Int[Array, "B T"],
        sees_cached_BTS: Bool[Array, "B T S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], None]:
        """The new residual, and None for the scan."""
        config, dtype, layout = self.config, self.dtype, self.layout
        norm = RMSNorm(config, "layers/pre_attention_norm/scale", name="pre_attention_norm")
        attention = Attention(config, dtype, layout, name="attention")
        x_BTD += attention(norm(x_BTD), angles, segment_ids_BT, sees_cached_BTS)
        if layout is not None:
            x_BTD = layout.constrain_residual(x_BTD)
        normalised_BTD = RMSNorm(config, "layers/pre_mlp_norm/scale", name="pre_mlp_norm")(x_BTD)
        if self.has_experts:
            moe = MixtureOfExperts(config, dtype, layout, self.dispatch, name="moe")
            x_BTD += moe(normalised_BTD, segment_ids_BT > 0)
        else:
            x_BTD += GatedMLP(config, dtype, layout, name="mlp")(normalised_BTD)
        if layout is not None:
            x_BTD = layout.constrain_residual(x_BTD)
        return x_BTD, None


class Embedder(nn.Module):
    """Token embedding, and the head where it is tied."""

    config: ModelConfig

    def setup(self) -> None:
        """Declares the embedding `[V, D]`."""
        self.embedding = declare(self, self.config, "token_embedder/embedding")


class OutputHead(nn.Module):
    """The untied output head."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Float[Array, "D V"]:
        """The head's kernel `[D, V]`."""
        return declare(self, self.config, "lm_head/kernel")


class Transformer(nn.Module):
    """A decoder-only language model, with its layers stacked on a leading axis and scanned.

    Attributes:
        config: the architecture.
        dtype: of activations and of weights as they are used; parameters are float32. Router,
            norms and softmax compute in float32 whatever this is.
        remat: what to store for the backward pass of a layer. "none": everything but an MLP's
            activated units and attention's scores; "dots": the results of products with weights;
            "projections": queries, keys, values and what attention makes of them, so that
            attention is not computed twice, and an MLP is; "offload": the same, in the host's
            memory; "full": only what enters the layer.
        layout: where to place activations on a mesh; None leaves it to the compiler.
        unrolled: apply layer after layer instead of a scan, with parameters from
            `aquila_jax.nn.cache.unroll`. Longer to compile; a step of generation, which reads
            every weight once, need not copy each layer's weights out of a stack.
        dispatch: how a mixture's tokens reach their experts.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from aquila_jax import Transformer, preset
        >>> model = Transformer(preset("toy_dense"))
        >>> tokens = jnp.zeros((1, 8), jnp.int32)
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
        >>> jax.eval_shape(model.apply, variables, tokens).shape
        (1, 8, 4096)
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    layout: Layout | None = None
    unrolled: bool = False
    dispatch: Dispatch = DEFAULT_DISPATCH

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
        *,
        targets_BT: Int[Array, "B T"] | None = None,
        with_best: bool = False,
    ) -> (
        Float[Array, "B T V"] | Float[Array, "B T"] | tuple[Float[Array, "B T"], Bool[Array, "B T"]]
    ):
        """Logits of the next token, float32 (float64 for a float64 model).

        Args:
            tokens_BT: token ids.
            segment_ids_BT: which document of a packed row each token belongs to; 0 is padding.
                None: every row is one document.
            positions_BT: position of each token in its document; None counts from the row's
                start.
            targets_BT: the tokens that follow. With them the result is their losses in nats,
                `[B, T]`, and logits of a large vocabulary never stand whole.
            with_best: give losses without a gradient, and whether each target is the likeliest
                token (of equal ones each is).

        With the variables of a `CACHE` collection (see `aquila_jax.nn.cache`) tokens also see
        the earlier ones of their document that lie there.
        """
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        embedding_VD = Embedder(self.config, name="token_embedder").embedding
        x_BTD = embed(embedding_VD, tokens_BT, self.dtype, self.config, self.layout)
        if self.layout is not None:
            x_BTD = self.layout.constrain_residual(x_BTD)
        sees_cached_BTS = None
        if self.has_variable(CACHE, "segment_ids"):
            cached_BS = self.get_variable(CACHE, "segment_ids")
            sees_cached_BTS = segment_ids_BT[:, :, None] == cached_BS[:, None, :]
        angles = rotation(self.config, positions_BT, self.dtype)
        for layers in self._layers():
            x_BTD, _ = layers(x_BTD, angles, segment_ids_BT, sees_cached_BTS)
        x_BTD = RMSNorm(self.config, "final_norm/scale", name="final_norm")(x_BTD)
        kernel = embedding_VD
        if not self.config.tie_embeddings:
            kernel = OutputHead(self.config, name="lm_head")()
        if targets_BT is None:
            return self._logits(x_BTD, kernel)
        head = Head(self.config, self.layout)
        if with_best:
            return token_scores(head, x_BTD, kernel, targets_BT)
        if self.layout is None and head.columns(tokens_BT.size) == self.config.vocab_size:
            return token_cross_entropy(self._logits(x_BTD, kernel), targets_BT)
        return token_losses(head, x_BTD, kernel, targets_BT)

    def _logits(self, x_BTD: jax.Array, kernel: jax.Array) -> jax.Array:
        kernel_DV = kernel.T if self.config.tie_embeddings else kernel
        logits_BTV = jnp.einsum(
            "BTD,DV->BTV",
            x_BTD,
            kernel_DV.astype(self.dtype),
            preferred_element_type=jnp.promote_types(self.dtype, jnp.float32),
        )
        if self.layout is None or self.config.vocab_size % self.layout.shards(VOCAB):
            return logits_BTV
        return self.layout.constrain(logits_BTV, BATCH, None, VOCAB)

    def _layers(self) -> Iterator[nn.Module]:
        """All layers as one scanned module, whose parameters are stacked on a leading axis.

        Or every layer by itself, where they are unrolled.
        """
        block = Block
        if self.remat != "none":
            # A scan's body is not merged with its neighbours, so nothing needs guarding.
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        config, dtype = self.config, self.dtype
        placed = (self.layout, self.dispatch)
        if self.unrolled:
            for layer in range(config.num_layers):
                has_experts = config.has_experts(layer)
                yield block(config, dtype, has_experts, *placed, name=f"layer_{layer}")
        elif config.moe_every == 1:
            layers = scanned(block, config.num_layers)
            yield layers(config, dtype, config.is_moe, *placed, name="layers")
        else:
            groups = scanned_groups(config, is_initializing=self.is_initializing())
            yield groups(block, config, dtype, *placed, name="layers")


def forward(
    model: Transformer,
    params: Any,
    batch: Mapping[str, jax.Array],
    rngs: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits of a packed batch, and what its routers report.

    Args:
        model: the decoder.
        params: its parameters.
        batch: `tokens`, `segment_ids` and `positions`, int32 `[B, T]`.
        rngs: random keys by stream, as `JITTER` of `aquila_jax.nn.moe`; needed by none.

    Returns:
        Logits `[B, T, V]`, and of a mixture what `aquila_jax.nn.moe.router.Report` holds, stacked
        by layer that has experts: `load_E` `[L, E]` and the others `[L]`.
    """
    return _apply(model, params, batch, rngs=dict(rngs or {}))


def forward_losses(
    model: Transformer,
    params: Any,
    batch: Mapping[str, jax.Array],
    rngs: Mapping[str, jax.Array] | None = None,
) -> tuple[WeightedSum, dict[str, jax.Array]]:
    """`forward` as far as the loss, with no need for whole logits.

    Args:
        model: the decoder.
        params: its parameters.
        batch: as in `forward`, with `targets` int32 and `loss_weights` float32 `[B, T]`.
        rngs: as in `forward`.

    Returns:
        The loss, and what routers report.
    """
    losses_BT, routing = _apply(
        model, params, batch, targets_BT=batch["targets"], rngs=dict(rngs or {})
    )
    weights_BT = batch["loss_weights"]
    return WeightedSum(jnp.sum(losses_BT * weights_BT), weights_BT.sum()), routing


def _apply(
    model: Transformer, params: Any, batch: Mapping[str, jax.Array], **options: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    result, variables = model.apply(
        {"params": params},
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        mutable=[ROUTER],
        **options,
    )
    # Groups of layers report from one module deeper than layers that are all alike.
    reports = axes.flatten(cast(Mapping[str, Any], variables.get(ROUTER, {})))
    routing = {path.rsplit("/", 1)[-1]: report for path, report in reports.items()}
    return cast(jax.Array, result), routing
