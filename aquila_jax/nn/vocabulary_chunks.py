"""The language-model loss from hidden states, without logits of a whole vocabulary.

Logits exist for some columns of the vocabulary at a time, in the forward and in the backward pass,
which computes them again. On a mesh the kernel's columns are gathered one chunk at a time too, and
its gradient is summed over devices in chunks, so neither stands whole on a device.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.axes import BATCH, EMBED, VOCAB
from aquila_jax.config import ModelConfig
from aquila_jax.sharding import Layout

# Float32 logits that a device may hold at once, in bytes.
_LOGITS_BYTES = 2**28
# The same where nothing is kept for gradients and memory is slow beside arithmetic: a CPU's cache.
_CACHED_BYTES = 2**23
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Head:
    """The matrix from hidden states to logits: where it is, and how it is cut.

    Attributes:
        config: the architecture.
        layout: mesh and rules; None on one device.
        chunk: columns of which a device computes logits at once; None for as many as fit in
            256 MiB.
    """

    config: ModelConfig
    layout: Layout | None = None
    chunk: int | None = None

    @property
    def path(self) -> str:
        """Of the parameter."""
        return "token_embedder/embedding" if self.config.tie_embeddings else "lm_head/kernel"

    @property
    def splits_width(self) -> bool:
        """Whether the kernel's width is split in place of its vocabulary, which does not divide."""
        return self.config.vocab_size % self.num_parts != 0

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """What splits `axis`, as names for collectives."""
        if self.layout is None:
            return ()
        return self.layout.width_axes(self.config) if axis == EMBED else self.layout.mesh_axes(axis)

    @property
    def num_parts(self) -> int:
        """Devices that share the columns of a chunk."""
        return 1 if self.layout is None else self.layout.shards(VOCAB)

    def columns(self, num_tokens: int) -> int:
        """How many columns a device computes at once, for so many tokens of its own."""
        most = -(-self.config.vocab_size // self.num_parts)
        if self.splits_width:
            most = self.config.vocab_size // self.num_parts
        return min(most, self.chunk or _fitting(_LOGITS_BYTES, num_tokens))

    def in_cache(self, num_tokens: int) -> "Head":
        """The same, cut so that a CPU's cache holds a chunk's logits of so many tokens."""
        platform = jax.default_backend() if self.layout is None else self.layout.platform
        if platform != "cpu":
            return self
        return dataclasses.replace(self, chunk=self.chunk or _fitting(_CACHED_BYTES, num_tokens))

    def on_shards(self, body: Any, inputs: tuple[Any, ...], outputs: Any) -> Any:
        """`body`, of hidden states, the kernel and arrays `[B, T]`, on every device's shards."""
        if self.layout is None:
            return body
        kernel = self.layout.parameter_spec(self.path, self.config)
        known = {"x": (BATCH, None, None), "kernel": kernel, "tokens": (BATCH, None)}
        specs = jax.tree.map(known.__getitem__, outputs)
        return self.layout.shard_map(body, [known[name] for name in inputs], specs)


def _fitting(num_bytes: int, num_tokens: int) -> int:
    """Columns of float32 logits of so many tokens; whole registers, and one at least."""
    return max(_LANES, num_bytes // (4 * num_tokens) // _LANES * _LANES)


def token_losses(
    head: Head,
    x_BTD: Float[Array, "B T D"],
    kernel: Float[Array, "..."],
    targets_BT: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Negative log-likelihood of every target, in nats, float32 at least.

    Logits, their sums and the gradients' sums over chunks are float32; matrix products take their
    operands in the dtype of `x_BTD`, gradients of logits among them.

    Args:
        head: how the kernel lies and is cut.
        x_BTD: hidden states after the last norm.
        kernel: the parameter `head.path`: `[D, V]`, or `[V, D]` where embeddings are tied.
        targets_BT: token ids.
    """
    return _token_losses(head, x_BTD, kernel, targets_BT)


def token_scores(
    head: Head,
    x_BTD: Float[Array, "B T D"],
    kernel: Float[Array, "..."],
    targets_BT: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """`token_losses`, and whether no other token's logit is above the target's.

    Has no gradient.
    """
    head = head.in_cache(targets_BT.size // (head.layout.batch_shards if head.layout else 1))
    normaliser_BT, picked_BT, highest_BT = _walked(head, x_BTD, kernel, targets_BT)
    return normaliser_BT - picked_BT, picked_BT >= highest_BT


def _walked(head: Head, x_BTD: Any, kernel: Any, targets_BT: Any) -> tuple[jax.Array, ...]:
    """`_normalise` on every device."""
    on_shards = head.on_shards(
        functools.partial(_normalise, head), ("x", "kernel", "tokens"), ("tokens",) * 3
    )
    return on_shards(x_BTD, kernel, targets_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(head: Head, x_BTD: Any, kernel: Any, targets_BT: Any) -> jax.Array:
    return _forward(head, x_BTD, kernel, targets_BT)[0]


def _forward(head: Head, x_BTD: Any, kernel: Any, targets_BT: Any) -> tuple[jax.Array, Any]:
    normaliser_BT, picked_BT, _ = _walked(head, x_BTD, kernel, targets_BT)
    return normaliser_BT - picked_BT, (x_BTD, kernel, targets_BT, normaliser_BT)


def _backward(head: Head, saved: Any, losses_bar_BT: jax.Array) -> tuple[Any, Any, None]:
    on_shards = head.on_shards(
        functools.partial(_gradients, head),
        ("x", "kernel", "tokens", "tokens", "tokens"),
        ("x", "kernel"),
    )
    x_bar_BTD, kernel_bar = on_shards(*saved, losses_bar_BT)
    return x_bar_BTD, kernel_bar, None


_token_losses.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """A device's walk over its columns. The last chunk overlaps the one before, unless it fits."""

    head: Head
    kernel_DV: jax.Array
    columns: int

    @property
    def width(self) -> int:
        """Columns of the stored kernel that one chunk takes."""
        return self.columns * (self.head.num_parts if self.head.splits_width else 1)

    def __len__(self) -> int:
        return -(-self.kernel_DV.shape[1] // self.width)

    def start(self, number: jax.Array) -> jax.Array:
        """The first stored column of a chunk."""
        return jnp.minimum(number * self.width, self.kernel_DV.shape[1] - self.width)

    def ids(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The token ids of a chunk's columns, and which columns no earlier chunk had."""
        part = _part(self.head.mesh_axes(VOCAB))
        columns_C = self.start(number) + jnp.arange(self.columns)
        if self.head.splits_width:
            columns_C += part * self.columns
        is_new_C = columns_C >= number * self.width
        return columns_C + (
            0 if self.head.splits_width else part * self.kernel_DV.shape[1]
        ), is_new_C

    def weights(self, number: jax.Array, dtype: Any) -> jax.Array:
        """A chunk of the kernel, `[D, C]`, with the parts of D that other devices hold."""
        part_DC = jax.lax.dynamic_slice_in_dim(
            self.kernel_DV, self.start(number), self.width, axis=1
        ).astype(dtype)
        if self.head.splits_width and (parts := self.head.mesh_axes(VOCAB)):
            part_DC = jax.lax.all_to_all(part_DC, parts, 1, 0, tiled=True)
        # The last axes first: see `Layout.join_width`.
        for widths in reversed(self.head.mesh_axes(EMBED)):
            part_DC = jax.lax.all_gather(part_DC, widths, axis=0, tiled=True)
        return part_DC

    def add(self, sum_DV: jax.Array, number: jax.Array, chunk_DC: jax.Array) -> jax.Array:
        """`sum_DV`, stored as the kernel is, plus a chunk's gradient by this device's tokens."""
        batch, widths = self.head.mesh_axes(BATCH), self.head.mesh_axes(EMBED)
        if others := tuple(axis for axis in batch if axis not in widths):
            chunk_DC = jax.lax.psum(chunk_DC, others)
        for axis in widths:
            if axis in batch:
                chunk_DC = jax.lax.psum_scatter(chunk_DC, axis, tiled=True)
            else:
                length = chunk_DC.shape[0] // jax.lax.axis_size(axis)
                chunk_DC = jax.lax.dynamic_slice_in_dim(
                    chunk_DC, jax.lax.axis_index(axis) * length, length
                )
        if self.head.splits_width and (parts := self.head.mesh_axes(VOCAB)):
            chunk_DC = jax.lax.all_to_all(chunk_DC, parts, 0, 1, tiled=True)
        start = self.start(number)
        before_DC = jax.lax.dynamic_slice_in_dim(sum_DV, start, self.width, axis=1)
        after_DC = before_DC + chunk_DC.astype(sum_DV.dtype)
        return jax.lax.dynamic_update_slice_in_dim(sum_DV, after_DC, start, axis=1)


def _part(mesh_axes: tuple[str, ...]) -> Any:
    return jax.lax.axis_index(mesh_axes) if mesh_axes else 0


def _chunks(head: Head, x_BTD: jax.Array, kernel: jax.Array) -> _Chunks:
    kernel_DV = kernel.T if head.config.tie_embeddings else kernel
    return _Chunks(head, kernel_DV, head.columns(x_BTD.shape[0] * x_BTD.shape[1]))


def _logits(x_BTD: jax.Array, weights_DC: jax.Array) -> jax.Array:
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    return jnp.einsum("BTD,DC->BTC", x_BTD, weights_DC, preferred_element_type=wide)


def _normalise(
    head: Head, x_BTD: jax.Array, kernel: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logarithm of the softmax's denominator, the targets' logits, and the highest."""
    chunks = _chunks(head, x_BTD, kernel)
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)

    def see(number: jax.Array, seen: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest_BT, sum_BT, picked_BT = seen
        ids_C, is_new_C = chunks.ids(number)
        logits_BTC = _logits(x_BTD, chunks.weights(number, x_BTD.dtype))
        logits_BTC = jnp.where(is_new_C, logits_BTC, -jnp.inf)
        higher_BT = jnp.maximum(highest_BT, logits_BTC.max(axis=-1))
        sum_BT *= jnp.exp(highest_BT - higher_BT)
        sum_BT += jnp.exp(logits_BTC - higher_BT[..., None]).sum(axis=-1)
        is_target_BTC = (ids_C == targets_BT[..., None]) & is_new_C
        picked_BT += jnp.where(is_target_BTC, logits_BTC, 0).sum(axis=-1)
        return higher_BT, sum_BT, picked_BT

    zeros_BT = jnp.zeros(targets_BT.shape, wide)
    lowest_BT = jnp.full(targets_BT.shape, jnp.finfo(wide).min)
    seen = jax.lax.fori_loop(0, len(chunks), see, (lowest_BT, zeros_BT, zeros_BT))
    highest_BT, sum_BT, picked_BT = seen
    if parts := head.mesh_axes(VOCAB):
        own_BT, highest_BT = highest_BT, jax.lax.pmax(highest_BT, parts)
        sum_BT = jax.lax.psum(sum_BT * jnp.exp(own_BT - highest_BT), parts)
        picked_BT = jax.lax.psum(picked_BT, parts)
    return highest_BT + jnp.log(sum_BT), picked_BT, highest_BT


def _gradients(
    head: Head,
    x_BTD: jax.Array,
    kernel: jax.Array,
    targets_BT: jax.Array,
    normaliser_BT: jax.Array,
    losses_bar_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of hidden states and kernel: softmax minus one at the target, times the weight."""
    chunks = _chunks(head, x_BTD, kernel)
    wide = normaliser_BT.dtype

    def add(number: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_bar_BTD, kernel_bar_DV = sums
        ids_C, is_new_C = chunks.ids(number)
        weights_DC = chunks.weights(number, x_BTD.dtype)
        bar_BTC = jnp.exp(_logits(x_BTD, weights_DC) - normaliser_BT[..., None])
        bar_BTC -= ids_C == targets_BT[..., None]
        bar_BTC = jnp.where(is_new_C, bar_BTC * losses_bar_BT[..., None], 0).astype(x_BTD.dtype)
        x_bar_BTD += jnp.einsum("BTC,DC->BTD", bar_BTC, weights_DC, preferred_element_type=wide)
        chunk_DC = jnp.einsum("BTD,BTC->DC", x_BTD, bar_BTC)
        return x_bar_BTD, chunks.add(kernel_bar_DV, number, chunk_DC)

    zeros = jnp.zeros(x_BTD.shape, wide), jnp.zeros_like(chunks.kernel_DV)
    x_bar_BTD, kernel_bar_DV = jax.lax.fori_loop(0, len(chunks), add, zeros)
    if parts := head.mesh_axes(VOCAB):
        x_bar_BTD = jax.lax.psum(x_bar_BTD, parts)
    kernel_bar = kernel_bar_DV.T if head.config.tie_embeddings else kernel_bar_DV
    return x_bar_BTD.astype(x_BTD.dtype), kernel_bar
