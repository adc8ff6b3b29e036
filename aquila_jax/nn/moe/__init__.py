"""Mixture of experts: route, dispatch, experts, combine.

`layer.py` is the module; `settings.py` how it computes; `router.py` what the router is charged
for and how healthy it is; `mixing.py` goes from logits to outputs, by way of `queues.py` (which
pairs wait for which expert), `exchange.py` and `ragged.py` (how rows reach experts on other
devices; `traffic.py`, at what cost) and `experts.py`.
"""

from aquila_jax.nn.moe.layer import JITTER, ROUTER, MixtureOfExperts
from aquila_jax.nn.moe.settings import DEFAULT_DISPATCH, Dispatch

__all__ = ["DEFAULT_DISPATCH", "JITTER", "ROUTER", "Dispatch", "MixtureOfExperts"]
