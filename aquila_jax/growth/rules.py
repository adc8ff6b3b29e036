"""How one leaf of a grown model comes from one leaf of its source.

A rule is data, so that the same rule can be told in a certificate, applied to a whole leaf under
`jit`, and applied layer by layer to a file that does not fit in memory.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax.growth.draws import chosen, exactly, leaf_key, normal, tree_sum

# Reads source layers by number, or a leaf without layers (None).
Read = Callable[[np.ndarray | None], Any]

# Puts a leaf's shards where they belong, but for those along the dimension whose units are taken.
Spread = Callable[[Any, int | None], Any]


def anywhere(leaf: Any, dim: int | None) -> Any:
    """The leaf where it is: on one device nothing is spread."""
    return leaf


@dataclasses.dataclass(frozen=True, eq=False)
class Take:
    """Units taken along one dimension, each times a factor.

    Attributes:
        dim: dimension of the leaf.
        index: int `[target]`, the unit of the source that each unit of the target takes.
        scale: float64 `[target]`, what each taken unit is multiplied by; None for one.
        gradient: float64 `[target]`, by what the leaf's gradient is multiplied along this
            dimension; 0 where the source's gradient does not tell; None for one.
    """

    dim: int
    index: np.ndarray
    scale: np.ndarray | None = None
    gradient: np.ndarray | None = None

    def apply(self, leaf: Any, xp: Any) -> Any:
        """The taken units; factors are applied in float32 at least."""
        leaf = take(leaf, self.index, self.dim, xp)
        if self.scale is None:
            return leaf
        shape = [1] * leaf.ndim
        shape[self.dim] = -1
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        return leaf.astype(wide) * xp.asarray(self.scale, wide).reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class UpperLayer:
    """AKI: new units of some dimensions hold what the layer above has for them.

    Attributes:
        layers: int `[target layers]`, the source layer that gives the new units.
        is_new: bool, broadcasts against the target leaf; where to use it.
    """

    layers: np.ndarray
    is_new: np.ndarray


@dataclasses.dataclass(frozen=True)
class Extend:
    """New units at the end of one dimension, that no unit of the source gives.

    Attributes:
        dim: dimension of the leaf.
        size: units of the target.
        fill: "mean" of the source's units, or "zero".
    """

    dim: int
    size: int
    fill: str

    def apply(self, leaf: Any, xp: Any) -> Any:
        """The longer leaf."""
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        units = xp.moveaxis(leaf, self.dim, -1)
        missing = self.size - units.shape[-1]
        if self.fill == "mean":
            new = tree_sum(units.astype(wide), -1, xp) * np.asarray(1 / units.shape[-1], wide)
        else:
            new = xp.zeros((*units.shape[:-1], 1), wide)
        new = xp.broadcast_to(new.astype(leaf.dtype), (*units.shape[:-1], missing))
        return xp.moveaxis(xp.concatenate([units, new], axis=-1), -1, self.dim)


@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
    """Normal noise, added once everything else is done.

    Attributes:
        std: standard deviation.
        where: bool, broadcasts against the target leaf.
        what: in words, for a certificate.
        fraction: share of those elements that get it, chosen at random.
    """

    std: float
    where: np.ndarray
    what: str
    fraction: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
    """An MLP's leaf as that of E experts: which of its hidden units each of them holds.

    Attributes:
        dim: dimension of the hidden units in the source leaf.
        units: int `[E, expert's units]`.
        redrawn: bool `[target layers, E, expert's units]`, hidden units that are drawn anew with
            the mean and deviation of the weights they replace; None for none.
        what: in words, for a certificate.
    """

    dim: int
    units: np.ndarray
    redrawn: np.ndarray | None
    what: str

    def are_copies(self, size: int) -> bool:
        """Whether every expert holds all of `size` units in order."""
        holds_all = self.units.shape[1] == size and all(map(_is_in_order, self.units))
        return self.redrawn is None and holds_all

    def apply(self, leaf: Any, xp: Any, spread: Spread) -> Any:
        """`[layers, ...] -> [layers, E, ...]`."""
        if self.are_copies(leaf.shape[self.dim]):
            return xp.repeat(xp.expand_dims(leaf, 1), len(self.units), axis=1)
        leaf = spread(leaf, self.dim)
        experts = [spread(take(leaf, units, self.dim, xp), self.dim) for units in self.units]
        return spread(xp.stack(experts, axis=1), self.dim + 1)

    def redraw(self, leaf: Any, drawn: Any, layers: np.ndarray, xp: Any, spread: Spread) -> Any:
        """`leaf` with its redrawn units replaced by `drawn`.

        Args:
            leaf: `[layers, E, ...]`, what `apply` gave.
            drawn: standard normal numbers of that shape.
            layers: int `[layers]`, the numbers of the target layers that these are.
            xp: `jax.numpy` or `numpy`.
            spread: where shards go between the steps.
        """
        if self.redrawn is None:
            return leaf
        shape = [len(layers), leaf.shape[1], *[1] * (leaf.ndim - 2)]
        shape[self.dim + 1] = -1
        replaced = xp.asarray(self.redrawn[layers].reshape(shape))
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        count = self.redrawn[0, 0].sum() * (np.prod(leaf.shape[2:]) // leaf.shape[self.dim + 1])
        share = np.asarray(1 / count, wide.dtype)

        def mean(x: Any) -> Any:
            x = xp.where(replaced, x, 0)
            for dim in range(2, leaf.ndim):
                x = tree_sum(spread(x, dim), dim, xp)
            return x * share

        centre = exactly(mean(wide))
        deviation = exactly(xp.sqrt(mean(exactly(xp.square(exactly(wide - centre))))))
        new = centre + exactly(deviation * drawn.astype(wide.dtype))
        return xp.where(replaced, new, wide).astype(leaf.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Mapped:
    """A target leaf computed from one source leaf.

    The parts are applied in the order of the attributes below.

    Attributes:
        source: path of the source leaf.
        transpose: whether the source's two dimensions are swapped (a tied head untied).
        extend: units that the source lacks (new tokens).
        layers: depth, int `[target layers]`: source layers along dimension 0; None for a leaf
            without layers.
        takes: width, one entry a dimension that changes.
        upper: what new units take from the layer above; needs `layers`.
        silent: bool `[target layers]`, layers whose leaf is zero, so that they add nothing.
        experts: how it becomes the leaf of experts; needs `layers`.
        noise: what is added to break symmetry.
    """

    source: str
    transpose: bool = False
    extend: Extend | None = None
    layers: np.ndarray | None = None
    takes: Sequence[Take] = ()
    upper: UpperLayer | None = None
    silent: np.ndarray | None = None
    experts: Experts | None = None
    noise: Noise | None = None

    @property
    def is_random(self) -> bool:
        """Whether applying it needs a key."""
        return self.noise is not None or (
            self.experts is not None and self.experts.redrawn is not None
        )

    @property
    def origin(self) -> str:
        """Either "copied", where units are whole ones of the source, or "mapped": scaled, mixed."""
        same_values = all(take.scale is None for take in self.takes)
        mixed = self.upper is not None or self.extend is not None or self.silent is not None
        return "copied" if same_values and not mixed and not self.is_random else "mapped"

    @property
    def how(self) -> str:
        """One short phrase for a certificate."""
        parts = {
            "transposed": self.transpose,
            "new tokens": self.extend is not None,
            "layers taken": self.layers is not None and not _is_in_order(self.layers),
            "units copied": not all(_is_in_order(take.index) for take in self.takes),
            "scaled": any(take.scale is not None for take in self.takes),
            "new units from the layer above": self.upper is not None,
            "inserted layers zero": self.silent is not None,
            self.experts.what if self.experts is not None else "": self.experts is not None,
            self.noise.what if self.noise is not None else "": self.noise is not None,
        }
        return ", ".join(part for part, is_done in parts.items() if is_done) or "as it was"

    def apply(
        self,
        leaf: jax.Array,
        path: str = "",
        key: jax.Array | None = None,
        spread: Spread = anywhere,
    ) -> jax.Array:
        """The target leaf, in the source leaf's dtype.

        Args:
            leaf: the source leaf, all its layers.
            path: of the target leaf, which its random numbers hang on.
            key: random key; needed where `is_random`.
            spread: where shards go between the steps.
        """

        def read(layers: np.ndarray | None) -> jax.Array:
            if layers is None:
                return leaf
            return _locally(lambda leaf: take(leaf, layers, 0, jnp), leaf, 0, spread)

        return self.build(read, path, key, spread=spread)

    def build(
        self,
        read: Read,
        path: str,
        key: jax.Array | None,
        rows: np.ndarray | None = None,
        xp: Any = jnp,
        spread: Spread = anywhere,
    ) -> Any:
        """The target leaf, or some of its layers.

        Args:
            read: gives source layers by their numbers, or a leaf without layers for None.
            path: of the target leaf.
            key: random key; needed where `is_random`.
            rows: numbers of the target layers that are built; None for all.
            xp: `jax.numpy` or `numpy`; both give the same bits.
            spread: where shards go between the steps.
        """
        if self.layers is None:
            rows = None
        elif rows is None:
            rows = np.arange(len(self.layers))
        grown = self._widened(read, self.layers, rows, xp, spread)
        if self.upper is not None:
            above = self._widened(read, self.upper.layers, rows, xp, spread)
            grown = xp.where(self.upper.is_new, above, grown)
        if self.silent is not None:
            silent = self.silent[rows].reshape(-1, *[1] * (grown.ndim - 1))
            grown = xp.where(silent, xp.zeros((), grown.dtype), grown)
        if self.experts is not None:
            grown = self.experts.apply(grown, xp, spread)
        if not self.is_random:
            return grown
        return self._randomised(spread(grown, None), path, key, rows, xp, spread)

    def _widened(
        self,
        read: Read,
        layers: np.ndarray | None,
        rows: np.ndarray | None,
        xp: Any,
        spread: Spread,
    ) -> Any:
        leaf = read(None if layers is None else layers[rows])
        dtype = leaf.dtype
        if self.transpose:
            leaf = leaf.T
        if self.extend is not None:
            extend = self.extend
            leaf = _locally(lambda leaf: extend.apply(leaf, xp), leaf, extend.dim, spread)
        for rule in self.takes:
            leaf = _locally(lambda leaf, rule=rule: rule.apply(leaf, xp), leaf, rule.dim, spread)
        return leaf if leaf.dtype == dtype else leaf.astype(dtype)

    def _randomised(
        self,
        leaf: Any,
        path: str,
        key: jax.Array | None,
        rows: np.ndarray | None,
        xp: Any,
        spread: Spread,
    ) -> Any:
        if key is None:
            raise ValueError(f"{path} is drawn at random and needs a key")
        drawn = xp.asarray(spread(normal(leaf_key(key, path), leaf.shape, rows), None))
        if self.experts is not None and rows is not None:
            leaf = self.experts.redraw(leaf, drawn, rows, xp, spread)
        if self.noise is not None:
            wide = jnp.promote_types(leaf.dtype, jnp.float32)
            added = exactly(drawn.astype(wide) * np.asarray(self.noise.std, wide))
            noisy = (exactly(leaf.astype(wide)) + added).astype(leaf.dtype)
            where = self.noise.where
            if self.noise.fraction < 1:
                mask_key = leaf_key(key, f"{path}: which")
                some = chosen(mask_key, leaf.shape, rows, self.noise.fraction)
                where = xp.logical_and(where, xp.asarray(some))
            leaf = xp.where(where, noisy, leaf)
        return leaf


@dataclasses.dataclass(frozen=True, eq=False)
class Fresh:
    """A target leaf that no source leaf gives: normal with mean 0.

    Attributes:
        std: standard deviation.
        stacked: whether dimension 0 is the layers.
        repeat: how many equal columns the last dimension's draws are repeated to (virtual groups).
    """

    std: float
    stacked: bool = True
    repeat: int = 1
    source: None = None
    origin: str = "fresh"

    @property
    def is_random(self) -> bool:
        """Whether applying it needs a key."""
        return True

    @property
    def how(self) -> str:
        """One short phrase for a certificate."""
        repeated = f", each column {self.repeat} times" if self.repeat > 1 else ""
        return f"normal, standard deviation {self.std:g}{repeated}"

    def draw(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        path: str,
        key: jax.Array,
        rows: np.ndarray | None = None,
    ) -> jax.Array:
        """The leaf of `shape`, or its layers `rows` (whose number `shape` then begins with)."""
        if self.stacked and rows is None:
            rows = np.arange(shape[0])
        drawn = normal(leaf_key(key, path), (*shape[:-1], shape[-1] // self.repeat), rows)
        return jnp.repeat((np.float32(self.std) * drawn).astype(dtype), self.repeat, axis=-1)


def _is_in_order(index: np.ndarray) -> bool:
    """Whether units are taken as they come, from the first on."""
    return np.array_equal(index, np.arange(len(index)))


def _locally(apply: Callable[[Any], Any], leaf: Any, dim: int, spread: Spread) -> Any:
    """`apply`, which takes units along `dim`, where every device has all of them."""
    return spread(spread(apply(spread(leaf, dim)), dim), None)


def take(leaf: Any, index: np.ndarray | None, dim: int, xp: Any) -> Any:
    """Units `index [taken]` of `leaf` along `dim`; itself where that is all of them in order."""
    if index is None or (len(index) == leaf.shape[dim] and _is_in_order(index)):
        return leaf
    if not isinstance(leaf, np.ndarray):
        return xp.take(leaf, index, axis=dim)
    # In the order of memory: a view of a file is transposed, and so is what will be written.
    order = sorted(range(leaf.ndim), key=lambda axis: -leaf.strides[axis])
    taken = np.take(leaf.transpose(order), index, axis=order.index(dim))
    return taken.transpose(np.argsort(order))
