"""The two public growths: `scale_up` (wider, deeper) and `scale_out` (into experts).

Example:
    >>> from aquila_jax import preset
    >>> from aquila_jax.axes import abstract_params
    >>> dense = preset("toy_dense")
    >>> mixture = jax.eval_shape(
    ...     lambda params, key: scale_out(params, dense, num_experts=4, key=key),
    ...     abstract_params(dense),
    ...     jax.random.key(0),
    ... )
    >>> mixture.params["layers"]["moe"]["gate"].shape  # layers, experts, width, hidden units
    (3, 4, 96, 256)
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError, check_number
from aquila_jax.growth.certificate import Certificate, certificate_of, with_dtype
from aquila_jax.growth.compose import Plan, apply_plan, check_plan, check_source
from aquila_jax.growth.depth import DEPTH_MAPS
from aquila_jax.growth.upcycle import Upcycling, is_upcycling_exact, upcycle_plan
from aquila_jax.growth.width import OPERATORS, Options, width_plan


class GrowthResult(NamedTuple):
    """A grown model.

    Attributes:
        params: nested dict of arrays, in the source's dtype.
        config: the grown model's configuration.
        certificate: where every leaf came from, and whether the function is kept.
    """

    params: dict[str, Any]
    config: ModelConfig
    certificate: Certificate


METHODS = tuple(OPERATORS)
SPLITS = ("even", "uneven")
HEAD_FILLS = ("mean", "zero")

_MAY_GROW = (
    "embed_dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "mlp_dim",
    "expert_mlp_dim",
    "shared_mlp_dim",
    "vocab_size",
)
_WHY_KEPT = {
    "head_dim": "rotary frequencies depend on it",
    "num_experts": "use scale_out to add experts",
    "experts_per_token": "use scale_out to add experts",
    "moe_every": "experts do not become dense layers",
}
# Neither shapes a weight that growth maps nor changes the function within its length.
_FREE = ("context_length", "tie_embeddings")


def scale_up(
    params: Mapping[str, Any],
    config: ModelConfig,
    target_config: ModelConfig,
    *,
    method: str = "aki_pro",
    depth: str | None = None,
    split: str = "even",
    noise: float = 0.0,
    new_head: str = "mean",
    seed: int = 0,
) -> GrowthResult:
    """Initialise a wider and deeper model from a trained one.

    Pure: runs eagerly, under `jax.jit` and under `jax.eval_shape`, with the same bits, and leaves
    `params` alone.

    Args:
        params: the source's parameters, as nested dicts of arrays.
        config: the source's configuration.
        target_config: the wanted one; embed_dim, num_heads, num_kv_heads, mlp_dim, num_layers and
            vocab_size may grow.
        method: the width operator; this and the rest are described at `ScaleUp`.
        depth: the depth operator; None takes the method's own.
        split: whether copies are read in even or uneven parts.
        noise: deviation of noise on new units.
        new_head: what the head gives new tokens.
        seed: of uneven parts and noise.

    Returns:
        The grown `(params, config, certificate)`; dtype as in the source.

    Raises:
        UserError: the target cannot be reached, or `params` are not those of `config`.

    Examples:
        >>> from aquila_jax import preset
        >>> source, target = preset("toy_dense"), preset("toy_large")
        >>> from aquila_jax.axes import abstract_params
        >>> grown = jax.eval_shape(scale_up, abstract_params(source), source, target)
        >>> grown.params["layers"]["attention"]["query"].shape
        (4, 128, 6, 32)

    References:
        AquilaMoE (arXiv 2408.06567), sections on Scale-Up and AKI-Pro; LEMON (arXiv 2310.07999).
    """
    growth = ScaleUp(method, depth, split, noise, new_head, seed)
    plan, certificate = growth.plan(config, target_config)
    check_source(params, config)
    grown = apply_plan(plan, params, target_config, key=jax.random.key(seed))
    return GrowthResult(grown, target_config, with_dtype(certificate, grown))


def check_growth(source: ModelConfig, target: ModelConfig) -> None:
    """`target` can be reached from `source` by width and depth.

    Raises:
        UserError: naming the field, both values and the way out.
    """
    for field in dataclasses.fields(ModelConfig):
        name, old, new = field.name, _size(source, field.name), _size(target, field.name)
        if name in _MAY_GROW and new < old:
            raise UserError(
                f"cannot grow {name} from {old} to {new}: the target is smaller than the source; "
                f"set the target's {name} to at least {old}"
            )
        if name not in (*_MAY_GROW, *_FREE) and new != old:
            why = _WHY_KEPT.get(name, "the function would change")
            raise UserError(
                f"cannot grow with {name} {old} in the source and {new} in the target: {why}; "
                f"set the target's {name} to {old}"
            )
    if target.heads_per_group < source.heads_per_group:
        raise UserError(
            f"cannot grow {source.heads_per_group} query heads a KV group into "
            f"{target.heads_per_group}: groups are copied whole; set the target's num_heads to at "
            f"least {target.num_kv_heads * source.heads_per_group}"
        )
    if target.shared_mlp_dim and not source.shared_mlp_dim:
        raise UserError(
            f"cannot grow a shared expert of {target.shared_mlp_dim} units out of none: set the "
            "target's shared_mlp_dim to 0, or share units when scaling out"
        )
    if target.tie_embeddings and not source.tie_embeddings:
        raise UserError(
            "cannot grow an untied head into tied embeddings: set the target's "
            "tie_embeddings to False"
        )


@dataclasses.dataclass(frozen=True)
class ScaleUp:
    """`scale_up` as a value: a setting of a run, or of a growth from disk to disk.

    Attributes:
        method: "fpi" (copies; exact in width for whole multiples of it), "isometric" (scaled
            copies; exact at any width), "zero_pad" (new channels zero, new units unread; exact),
            "aki" and "aki_pro" (new units from the layer above; not exact), "latent" (new units
            from the layer above, unread at first; exact). KV groups are copied whole, and kept
            in number by "aki" and "aki_pro".
        depth: "stacking", "interpolation", "solar" or "identity" (inserted layers add nothing;
            exact); None takes the method's own: stacking for "aki", interpolation for "fpi" and
            "aki_pro", else identity.
        split: "even", or "uneven": copies are read in random parts, which tells them apart and
            keeps exactness (LEMON). Changes nothing where new units are unread.
        noise: standard deviation of normal noise on new units of matrices, in units of a freshly
            initialised matrix's; not exact unless 0.
        new_head: head of new tokens: "mean" of the others' weights, or "zero". Their embedding
            is the mean.
        seed: of uneven parts and noise.
    """

    method: str = "aki_pro"
    depth: str | None = None
    split: str = "even"
    noise: float = 0.0
    new_head: str = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_name("growth method", self.method, METHODS)
        if self.depth is not None:
            _check_name("depth method", self.depth, DEPTH_MAPS)
        _check_name("split", self.split, SPLITS)
        _check_name("new_head", self.new_head, HEAD_FILLS)
        check_number("noise", self.noise, least=0)

    @property
    def kind(self) -> str:
        """Its name in ledgers."""
        return "scale_up"

    def plan(self, source: ModelConfig, target: ModelConfig) -> tuple[Plan, Certificate]:
        """How every leaf of `target` comes from `source`, checked, without any parameters.

        Raises:
            UserError: `target` cannot be reached.
        """
        check_growth(source, target)
        operator = OPERATORS[self.method]
        self._check_groups_and_head(source, target)
        depth_name = self.depth or operator.depth
        depth = DEPTH_MAPS[depth_name](source.num_layers, target.num_layers)
        options = Options(self.split == "uneven", self.noise, self.new_head, self.seed)
        plan = width_plan(operator, source, target, depth, options)
        check_plan(plan, source, target)
        certificate = certificate_of(
            plan,
            source,
            target,
            method=self.method + (", uneven" if options.uneven else ""),
            depth=depth_name,
            exact=operator.keeps_width(source, target)
            and depth.is_exact
            and all(rule.noise is None for rule in plan.values()),
        )
        return plan, certificate

    def _check_groups_and_head(self, source: ModelConfig, target: ModelConfig) -> None:
        groups = (source.num_kv_heads, target.num_kv_heads)
        if groups[0] != groups[1] and self.method in ("aki", "aki_pro"):
            raise UserError(
                f"{self.method} cannot grow num_kv_heads from {groups[0]} to {groups[1]}: query "
                f"heads grow inside their KV group; set the target's num_kv_heads to {groups[0]}, "
                "or take another method"
            )
        if self.new_head == "zero" and target.tie_embeddings:
            raise UserError(
                "new_head='zero' needs a head of its own: set the target's tie_embeddings to "
                "False, or new_head to 'mean'"
            )


def _size(config: ModelConfig, name: str) -> Any:
    """A field's value, with what 0 stands for."""
    return config.expert_dim if name == "expert_mlp_dim" else getattr(config, name)


def _check_name(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise UserError(f"no {what} {name!r}; there are {', '.join(known)}")


def scale_out(
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    num_experts: int = 8,
    experts_per_token: int = 2,
    router_std: float = 0.02,
    key: jax.Array,
    shared_mlp_dim: int = 0,
    moe_every: int = 1,
    renormalize_gates: bool | None = None,
    **variations: Any,
) -> GrowthResult:
    """Initialise a mixture of experts from a dense model, by sparse upcycling.

    Every expert is a copy of its layer's MLP; routers are normal with mean 0. With gates that are
    renormalised the function is kept exactly. Pure, like `scale_up`.

    Args:
        params: the dense model's parameters, as nested dicts of arrays.
        config: the dense model's configuration.
        num_experts: E, copies of the MLP.
        experts_per_token: k, copies a token visits.
        router_std: standard deviation of the routers; this and `variations` are those of
            `ScaleOut`.
        key: random key of routers, redrawn units and noise.
        shared_mlp_dim: hidden units that every token visits; routed experts hold the others.
        moe_every: only every n-th layer gets experts.
        renormalize_gates: whether the chosen gates are divided by their sum; None as in `config`.
        **variations: `granularity`, `redraw`, `noise` and others of `ScaleOut`.

    Returns:
        The `(params, config, certificate)` of the mixture; dtype as in the source.

    Raises:
        UserError: the source has experts already, or the settings do not fit each other.

    References:
        Sparse Upcycling (arXiv 2212.05055); AquilaMoE (arXiv 2408.06567), section on Scale-Out.
    """
    _check_variations(variations)
    growth = ScaleOut(router_std, **variations)
    granularity = growth.granularity
    if num_experts < 1:
        raise UserError(f"num_experts must be at least 1, not {num_experts}")
    if renormalize_gates is None:
        renormalize_gates = config.renormalize_gates
    target = dataclasses.replace(
        config,
        num_experts=num_experts * granularity,
        experts_per_token=experts_per_token * granularity,
        expert_mlp_dim=growth.expert_dim(config, shared_mlp_dim),
        shared_mlp_dim=shared_mlp_dim,
        moe_every=moe_every,
        renormalize_gates=renormalize_gates,
    )
    plan, certificate = growth.plan(config, target)
    check_source(params, config)
    grown = apply_plan(plan, params, target, key)
    return GrowthResult(grown, target, with_dtype(certificate, grown))


@dataclasses.dataclass(frozen=True)
class ScaleOut(Upcycling):
    """`scale_out` as a value; the mixture's shape is that of the run's model.

    Its attributes are those of `Upcycling`.
    """

    def __post_init__(self) -> None:
        for name in ("router_std", "noise"):
            check_number(name, getattr(self, name), least=0)
        check_number("granularity", self.granularity, least=1, is_whole=True)
        if not 0 <= self.redraw <= 1:
            raise UserError(f"redraw is a share of units, from 0 to 1, not {self.redraw}")
        if not 0 < self.noise_fraction <= 1:
            raise UserError(f"noise_fraction must lie in (0, 1], but is {self.noise_fraction}")

    @property
    def kind(self) -> str:
        """Its name in ledgers."""
        return "scale_out"

    def expert_dim(self, source: ModelConfig, shared_mlp_dim: int) -> int:
        """Hidden units of one expert; 0 where that is the MLP's own width.

        Raises:
            UserError: the units that are not shared cannot be cut into `granularity` equal parts.
        """
        routed = source.mlp_dim - shared_mlp_dim
        if routed < self.granularity or routed % self.granularity:
            raise UserError(
                f"{routed} hidden units (mlp_dim {source.mlp_dim} less shared_mlp_dim "
                f"{shared_mlp_dim}) cannot be cut into {self.granularity} equal experts: choose "
                "another granularity or shared_mlp_dim"
            )
        size = routed // self.granularity
        return 0 if size == source.mlp_dim else size

    def plan(self, source: ModelConfig, target: ModelConfig) -> tuple[Plan, Certificate]:
        """How every leaf of `target` comes from `source`, checked, without any parameters.

        Raises:
            UserError: `source` is a mixture, or `target` differs from it in more than its experts.
        """
        self._check(source, target)
        plan = upcycle_plan(source, target, self)
        check_plan(plan, source, target)
        exact = is_upcycling_exact(target, self)
        certificate = certificate_of(
            plan, source, target, method="sparse_upcycling", depth="", exact=exact
        )
        return plan, certificate

    def _check(self, source: ModelConfig, target: ModelConfig) -> None:
        if source.is_moe:
            raise UserError(
                f"the source already has {source.num_experts} experts: scale_out starts from a "
                "dense model"
            )
        if not target.is_moe:
            raise UserError("scale_out makes experts, but the target's num_experts is 0")
        for name in ("num_experts", "experts_per_token"):
            if getattr(target, name) % self.granularity:
                raise UserError(
                    f"{name} ({getattr(target, name)}) must be a multiple of the granularity "
                    f"({self.granularity}): that many experts make one copy of the MLP"
                )
        if self.compensate and target.renormalize_gates:
            raise UserError(
                "compensate=True would multiply outputs of renormalised gates: set "
                "renormalize_gates to False, or compensate to False"
            )
        size = self.expert_dim(source, target.shared_mlp_dim) or source.mlp_dim
        for field in dataclasses.fields(ModelConfig):
            expected = {"expert_mlp_dim": size}.get(field.name, _size(source, field.name))
            wanted = _size(target, field.name)
            if field.name not in _MADE_BY_SCALE_OUT and expected != wanted:
                raise UserError(
                    f"scale-out cannot change {field.name} from {expected} to {wanted}: scale up "
                    "first, or set the target's value to the former"
                )


def _check_variations(variations: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(ScaleOut)}
    if unknown := sorted(set(variations) - known):
        raise UserError(f"scale_out knows no {', '.join(unknown)}; it knows {', '.join(known)}")


_MADE_BY_SCALE_OUT = (
    "num_experts",
    "experts_per_token",
    "shared_mlp_dim",
    "moe_every",
    "renormalize_gates",
    "router_scores",
    "router_scale",
    "router_bias",
)
