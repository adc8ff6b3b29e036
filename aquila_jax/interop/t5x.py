"""The bridge to t5x, for teams that run it: our decoder as its model, our growth in its restore.

t5x is not on PyPI: it comes from its git repository, as `airio` and `jestimator` do, which it
imports. Nothing else of this library imports it or this module; `gin_configs/t5x/` does.

    python -m t5x.train --gin_file=gin_configs/t5x/pretrain.gin --gin.MODEL_DIR="'/path'" ...
"""

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.linen.partitioning import AxisMetadata

from aquila_jax import axes
from aquila_jax.config import ModelConfig
from aquila_jax.data.pretrained_tokenizer import check_vocab_size, open_tokenizer, start_id
from aquila_jax.data.seqio_vocabulary import LanguageModelConverter
from aquila_jax.data.tasks import register_mixture
from aquila_jax.data.vocabulary import load_vocabulary
from aquila_jax.errors import UserError
from aquila_jax.growth import ScaleOut, ScaleUp, apply_plan
from aquila_jax.nn import Transformer, forward
from aquila_jax.nn.losses import cross_entropy

try:
    models: Any = importlib.import_module("t5x.models")
    losses: Any = importlib.import_module("t5x.losses")
except ImportError as error:
    raise UserError(
        f"the bridge to t5x needs t5x, airio and jestimator from their git repositories ({error})"
    ) from error

# Of a t5x checkpoint: its parameters, its optimizer's state, and where Orbax keeps both.
_TARGET, _OPTIMIZER, _ORBAX_ITEM = "target", "state", "state"
_NAMES = {
    "tokens": "decoder_input_tokens",
    "segment_ids": "decoder_segment_ids",
    "positions": "decoder_positions",
}


def mixture(
    rates: Mapping[str, float], *, text_dir: str, tokenizer_path: str, shuffle_buffer: int = 2048
) -> str:
    """The name of a registered seqio mixture of this library's texts.

    Args:
        rates: relative numbers of pieces to draw from each source.
        text_dir: where the text packages lie.
        tokenizer_path: as for `open_tokenizer`.
        shuffle_buffer: pieces that are shuffled together.

    Raises:
        UserError: there is no such tokenizer.
    """
    return register_mixture(rates, text_dir, tokenizer_path, shuffle_buffer).name


class AquilaModel(models.BaseTransformerModel):
    """Our decoder as t5x's model: it trains, evaluates and scores under t5x.

    The loss is the mean over tokens, with a mixture's router losses added. Texts are generated
    by `aquila generate`, from an export, and not under t5x.

    Args:
        config: the architecture.
        tokenizer_path: of the tasks' tokenizer, as for `open_tokenizer`.
        optimizer_def: t5x's.
        dtype: of activations.
        remat: as for `Transformer`.
        load_balance: weight of the load-balancing loss, averaged over layers.
        router_z: weight of the router z-loss, averaged over layers.
        z_loss: weight of t5x's own z-loss, of the logits.

    Raises:
        UserError: there is no such tokenizer, or it has ids that the model does not know.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer_path: str,
        optimizer_def: Any,
        *,
        dtype: str = "float32",
        remat: str = "none",
        load_balance: float = 1e-3,
        router_z: float = 1e-2,
        z_loss: float = 0.0,
    ) -> None:
        tokenizer = open_tokenizer(tokenizer_path)
        check_vocab_size(tokenizer, config.vocab_size)
        vocabulary = load_vocabulary(tokenizer_path)
        super().__init__(
            Transformer(config, dtype=jnp.dtype(dtype), remat=remat),
            input_vocabulary=vocabulary,
            output_vocabulary=vocabulary,
            optimizer_def=optimizer_def,
            z_loss=z_loss,
            loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
        )
        self.config = config
        self._router_weights = {"load_balance_loss": load_balance, "router_z_loss": router_z}
        # t5x makes a converter from this name, with its own arguments.
        self.FEATURE_CONVERTER_CLS = functools.partial(
            LanguageModelConverter, start_id=start_id(tokenizer)
        )

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Any],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Fresh parameters by a random key, and the names of their axes for t5x's rules."""
        del input_types  # tokens are int32
        tokens_BT = jnp.zeros(input_shapes[_NAMES["tokens"]], jnp.int32)
        named = {
            f"{path}_axes": AxisMetadata(parameter.axes)
            for path, parameter in axes.parameters(self.config).items()
        }
        params = self.module.init(rng, tokens_BT)["params"]
        return {"params": params, "params_axes": axes.unflatten(named)}

    def loss_fn(
        self, params: Any, batch: Mapping[str, Any], dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """The scalar loss per token, and t5x's metrics. There is no dropout."""
        del dropout_rng
        logits_BTV, routing = self._forward(params, batch)
        targets_BT = batch["decoder_target_tokens"]
        factor, weights_BT = losses.get_loss_normalizing_factor_and_weights(
            self._loss_normalizing_factor, batch
        )
        loss, z_loss, _ = losses.compute_weighted_cross_entropy(
            logits_BTV,
            targets=targets_BT,
            weights=weights_BT,
            z_loss=self._z_loss,
            loss_normalizing_factor=factor,
        )
        for name, weight in self._router_weights.items() if self.config.is_moe else ():
            loss += weight * routing[name].mean()
        metrics = self._compute_metrics(
            logits=logits_BTV,
            targets=targets_BT,
            mask=weights_BT,
            loss=loss,
            z_loss=z_loss,
            segment_ids={"decoder": batch["decoder_segment_ids"]},
        )
        return loss, metrics

    def score_batch(
        self, params: Any, batch: Mapping[str, Any], return_intermediates: bool = False
    ) -> jax.Array:
        """The log-likelihood of each row's targets, in nats, float32 `[B]`.

        Raises:
            UserError: intermediates are asked for, which the decoder does not keep.
        """
        if return_intermediates:
            raise UserError("the decoder keeps no intermediates: set return_intermediates to False")
        logits_BTV, _ = self._forward(params, batch)

        def row(*parts: jax.Array) -> jax.Array:
            return -cross_entropy(*(part[None] for part in parts)).total

        weights_BT = batch["decoder_loss_weights"].astype(jnp.float32)
        return jax.vmap(row)(logits_BTV, batch["decoder_target_tokens"], weights_BT)

    def predict_batch_with_aux(
        self, params: Any, batch: Mapping[str, Any], rng: jax.Array | None = None, **options: Any
    ) -> Any:
        """Refused, whatever the key.

        Raises:
            UserError: always; it says how texts are generated.
        """
        del params, batch, rng, options
        raise UserError(
            "texts are not generated under t5x: set infer_eval_dataset_cfg to None, export the "
            "model and use `aquila generate`"
        )

    def _compute_logits(
        self, params: Any, batch: Mapping[str, Any], dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        del dropout_rng
        return self._forward(params, batch)[0]

    def _forward(
        self, params: Any, batch: Mapping[str, Any]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        ours = {name: batch[theirs] for name, theirs in _NAMES.items()}
        return forward(self.module, params, ours)


def grow_on_restore(
    checkpoint_state: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    path: str,
    source: ModelConfig,
    target: ModelConfig,
    growth: ScaleUp | ScaleOut,
    seed: int = 0,
    is_resuming: bool = False,
) -> Mapping[str, Any]:
    """Growth as one of `RestoreCheckpointConfig.state_transformation_fns`.

    t5x transforms names before it reads, so what is to be grown is read here, whole, on every
    host. The optimizer begins anew: set `fallback_to_scratch`.

    Args:
        checkpoint_state: the checkpoint's, as t5x describes it.
        state: that of the model being restored.
        path: the checkpoint, as in `RestoreCheckpointConfig.path`.
        source: its architecture.
        target: the architecture being restored.
        growth: what to do.
        seed: of fresh parameters.
        is_resuming: whether a run goes on from its own checkpoint, which has grown already.

    Returns:
        The grown parameters alone; when resuming, `checkpoint_state` itself.

    Raises:
        UserError: the checkpoint is not of `source`, or `target` cannot be reached from it.
    """
    if is_resuming:
        return checkpoint_state
    item = Path(path) / _ORBAX_ITEM
    if not item.is_dir():
        raise UserError(f"{path} is no checkpoint that t5x wrote by Orbax: there is no {item}")
    params = axes.flatten(ocp.PyTreeCheckpointer().restore(item)[_TARGET])
    expected = {name: p.shape(source) for name, p in axes.parameters(source).items()}
    found = {name: tuple(leaf.shape) for name, leaf in params.items()}
    if found != expected:
        differ = sorted(name for name, _ in set(found.items()) ^ set(expected.items()))
        raise UserError(
            f"{path} does not hold the model to grow: {', '.join(dict.fromkeys(differ))}"
        )
    plan, _ = growth.plan(source, target)
    grown = apply_plan(plan, axes.unflatten(params), target=target, key=jax.random.key(seed))
    del state
    return {_TARGET: jax.device_get(grown)}
