"""What a run needs of a slice of TPUs, told before there is one."""

from aquila_jax.planning.chips import CHIPS, Topology, parse_topology
from aquila_jax.planning.page import page
from aquila_jax.planning.plan import Plan, make_plan
from aquila_jax.planning.search import search

__all__ = ["CHIPS", "Plan", "Topology", "make_plan", "page", "parse_topology", "search"]
