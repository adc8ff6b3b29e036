"""The two public growths: `scale_up` (wider, deeper) and `scale_out` (into experts)."""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from aquila_jax.config import ModelConfig
from aquila_jax.errors import UserError
from aquila_jax.growth.certificate import Certificate, certificate_of
from aquila_jax.growth.compose import Plan, apply_plan, check_plan, check_source
from aquila_jax.growth.depth import DEPTH_MAPS
from aquila_jax.growth.upcycle import upcycle_plan
from aquila_jax.growth.width import aki_plan, fpi_plan, is_fpi_exact, is_same_shape


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


class _Method(NamedTuple):
    plan: Callable[[ModelConfig, ModelConfig, np.ndarray], Plan]
    is_exact: Callable[[ModelConfig, ModelConfig], bool]
    default_depth: str


METHODS: Mapping[str, _Method] = types.MappingProxyType(
    {
        "fpi": _Method(fpi_plan, is_fpi_exact, "interpolation"),
        "aki": _Method(aki_plan, is_same_shape, "stacking"),
        "aki_pro": _Method(aki_plan, is_same_shape, "interpolation"),
    }
)

_MAY_GROW = ("embed_dim", "num_layers", "num_heads", "mlp_dim")
_WHY_KEPT = {
    "head_dim": "rotary frequencies depend on it",
    "num_kv_heads": "query heads grow inside their KV group",
    "vocab_size": "the tokenizer stays",
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
) -> GrowthResult:
    """Initialise a wider and deeper model from a trained one.

    Pure: runs eagerly, under `jax.jit` and under `jax.eval_shape`, and leaves `params` alone.

    Args:
        params: the source's parameters, as nested dicts of arrays.
        config: the source's configuration.
        target_config: the wanted one; embed_dim, num_heads, mlp_dim and num_layers may grow.
        method: "fpi" (copies, exact for whole multiples of the width and equal depth), "aki"
            (new units from the layer above, layers stacked) or "aki_pro" (AKI with layers
            interpolated).
        depth: "stacking" or "interpolation"; None takes the method's own.

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
        AquilaMoE (arXiv 2408.06567), sections on Scale-Up and AKI-Pro.
    """
    plan, certificate = plan_scale_up(config, target_config, method=method, depth=depth)
    check_source(params, config)
    grown = apply_plan(plan, params, target_config, key=None)
    return GrowthResult(grown, target_config, certificate)


def plan_scale_up(
    config: ModelConfig, target_config: ModelConfig, *, method: str, depth: str | None = None
) -> tuple[Plan, Certificate]:
    """The checked plan of `scale_up` and its certificate, without any parameters.

    Raises:
        UserError: the target cannot be reached from the source.
    """
    if method not in METHODS:
        raise UserError(f"no growth method {method!r}; there are {', '.join(METHODS)}")
    depth = METHODS[method].default_depth if depth is None else depth
    if depth not in DEPTH_MAPS:
        raise UserError(f"no depth method {depth!r}; there are {', '.join(DEPTH_MAPS)}")
    check_growth(config, target_config)
    layers = DEPTH_MAPS[depth](config.num_layers, target_config.num_layers)
    plan = METHODS[method].plan(config, target_config, layers)
    check_plan(plan, config, target_config)
    exact = METHODS[method].is_exact(config, target_config)
    certificate = certificate_of(
        plan, config, target_config, method=method, depth=depth, exact=exact
    )
    return plan, certificate


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
    if target.tie_embeddings and not source.tie_embeddings:
        raise UserError(
            "cannot grow an untied head into tied embeddings: set the target's "
            "tie_embeddings to False"
        )


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
class ScaleUp:
    """`scale_up` as a setting of a run.

    Attributes:
        method: "fpi", "aki" or "aki_pro".
        depth: "stacking" or "interpolation"; None takes the method's own.
    """

    method: str = "aki_pro"
    depth: str | None = None

    @property
    def kind(self) -> str:
        """Its name in ledgers."""
        return "scale_up"

    def plan(self, source: ModelConfig, target: ModelConfig) -> tuple[Plan, Certificate]:
        """How every leaf of `target` comes from `source`.

        Raises:
            UserError: `target` cannot be reached.
        """
        return plan_scale_up(source, target, method=self.method, depth=self.depth)


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
