"""The two public growths: `scale_up` (wider, deeper) and `scale_out` (into experts)."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.growth.certificate import Certificate, certificate_of
from aquila_jax.growth.compose import Plan, apply_plan, check_plan, check_source
from aquila_jax.growth.depth import DEPTH_MAPS
from aquila_jax.growth.upcycle import upcycle_plan
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

_MAY_GROW = ("embed_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size")
_WHY_KEPT = {
    "head_dim": "rotary frequencies depend on it",
    "num_experts": "use scale_out to add experts",
    "experts_per_token": "use scale_out to add experts",
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
            vocab_size may grow. Whole KV groups are copied (not by "aki" and "aki_pro", which
            keep their number).
        method: "fpi" (copies; exact in width for whole multiples of it), "isometric" (scaled
            copies; exact at any width), "zero_pad" (new channels zero, new units unread; exact),
            "aki" and "aki_pro" (new units from the layer above; not exact), "latent" (new units
            from the layer above, unread at first; exact).
        depth: "stacking", "interpolation", "solar" or "identity" (inserted layers add nothing;
            exact); None takes the method's own: stacking for "aki", interpolation for "fpi" and
            "aki_pro", else identity.
        split: "even", or "uneven": copies are read in random parts, which tells them apart and
            keeps exactness (LEMON). Changes nothing where new units are unread.
        noise: standard deviation of normal noise on new units of matrices, in units of a freshly
            initialised matrix's; not exact unless 0.
        new_head: logits of new tokens: "mean" of the others' weights, or "zero". Their embedding
            is the mean.
        seed: of uneven parts and noise.

    Returns:
        The grown `(params, config, certificate)`; dtype as in the source.

    Raises:
        UserError: the target cannot be reached, or `params` are not those of `config`.

    Example:
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
    return GrowthResult(grown, target_config, certificate)


def check_growth(source: ModelConfig, target: ModelConfig) -> None:
    """`target` can be reached from `source` by width and depth.

    Raises:
        UserError: naming the field, both values and the way out.
    """
    for field in dataclasses.fields(ModelConfig):
        name, old, new = field.name, getattr(source, field.name), getattr(target, field.name)
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
    if target.tie_embeddings and not source.tie_embeddings:
        raise UserError(
            "cannot grow an untied head into tied embeddings: set the target's "
            "tie_embeddings to False"
        )


@dataclasses.dataclass(frozen=True)
class ScaleUp:
    """`scale_up` as a value: a setting of a run, or a growth from disk to disk.

    Attributes:
        method: "fpi", "isometric", "zero_pad", "aki", "aki_pro" or "latent".
        depth: "stacking", "interpolation", "solar" or "identity"; None takes the method's own.
        split: "even" or "uneven".
        noise: on new units, in units of a fresh matrix's deviation.
        new_head: "mean" or "zero": what the head gives new tokens.
        seed: of uneven parts.
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
        if self.noise < 0:
            raise UserError(f"noise must not be negative, but is {self.noise}")

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
) -> GrowthResult:
    """Initialise a mixture of experts from a dense model, by sparse upcycling.

    Every expert is a copy of its layer's MLP; routers are normal with mean 0. With the
    configuration's `renormalize_gates` the function is kept exactly. Pure, like `scale_up`.

    Args:
        params: the dense model's parameters, as nested dicts of arrays.
        config: the dense model's configuration.
        num_experts: E.
        experts_per_token: k.
        router_std: standard deviation of the routers (the paper prints 0.02 as a variance).
        key: random key of the routers.

    Returns:
        The `(params, config, certificate)` of the mixture; dtype as in the source.

    Raises:
        UserError: the source has experts already, or E and k do not fit each other.

    References:
        Sparse Upcycling (arXiv 2212.05055); AquilaMoE (arXiv 2408.06567), section on Scale-Out.
    """
    plan, certificate = plan_scale_out(
        config,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        router_std=router_std,
    )
    check_source(params, config)
    target = certificate.target
    return GrowthResult(apply_plan(plan, params, target, key), target, certificate)


@dataclasses.dataclass(frozen=True)
class ScaleOut:
    """`scale_out` as a setting of a run; experts are those of the run's model.

    Attributes:
        router_std: standard deviation of the routers.
    """

    router_std: float = 0.02

    @property
    def kind(self) -> str:
        """Its name in ledgers."""
        return "scale_out"

    def plan(self, source: ModelConfig, target: ModelConfig) -> tuple[Plan, Certificate]:
        """How every leaf of `target` comes from `source`.

        Raises:
            UserError: `target` differs from `source` in more than its experts.
        """
        plan, certificate = plan_scale_out(
            source,
            num_experts=target.num_experts,
            experts_per_token=target.experts_per_token,
            router_std=self.router_std,
        )
        for field in dataclasses.fields(ModelConfig):
            reached, wanted = (getattr(c, field.name) for c in (certificate.target, target))
            if reached != wanted:
                raise UserError(
                    f"scale-out cannot change {field.name} from {reached} to {wanted}: "
                    "scale up first, or set the target's value to the source's"
                )
        return plan, certificate


def plan_scale_out(
    config: ModelConfig, *, num_experts: int, experts_per_token: int, router_std: float
) -> tuple[Plan, Certificate]:
    """The checked plan of `scale_out` and its certificate, without any parameters.

    Raises:
        UserError: the source has experts already, or E and k do not fit each other.
    """
    if config.is_moe:
        raise UserError(
            f"the source already has {config.num_experts} experts: scale_out starts from a "
            "dense model"
        )
    if num_experts < 1:
        raise UserError(f"num_experts must be at least 1, not {num_experts}")
    if router_std < 0:
        raise UserError(f"router_std must not be negative, but is {router_std}")
    target = dataclasses.replace(
        config, num_experts=num_experts, experts_per_token=experts_per_token
    )
    plan = upcycle_plan(target, router_std)
    check_plan(plan, config, target)
    certificate = certificate_of(
        plan,
        config,
        target,
        method="sparse_upcycling",
        depth="",
        # All gates of a softmax sum to 1 without being divided.
        exact=target.renormalize_gates or experts_per_token == num_experts,
    )
    return plan, certificate
