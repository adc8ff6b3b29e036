"""The processes of one run: how they find each other, agree, and hear of one that is lost.

`joined` wraps whatever runs on all of them; `current` gives the group to everything inside.
"""

from aquila_jax.hosts.cluster import Cluster, find
from aquila_jax.hosts.group import Group, current
from aquila_jax.hosts.joining import joined

__all__ = ["Cluster", "Group", "current", "find", "joined"]
