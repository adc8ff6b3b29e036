"""What a mixture does around its matrix products, without a sort.

    routed = route(logits_NE, is_token_N, experts_per_token=2, renormalize=True)
    rows_MD = permute(x_ND, routed.slots_Nk)             # M = N k rows, in expert order
    rows_MF = grouped_matmul(rows_MD, weights_EDF, routed.counts_E)  # and so on, back to D
    y_ND = unpermute(rows_MD, routed.slots_Nk, routed.gates_Nk)

Each is a readable reference in plain JAX and a Pallas TPU kernel behind one differentiable
function; `backend=` chooses, see `Backend`. Inside `shard_map` they act on the shard.

Other places than `route`'s serve as well: `permute(..., num_rows=M)` takes any slots, leaves rows
without a pair zero and drops pairs whose slot is not in [0, M), which `unpermute` counts as zero:
fixed slots per expert, groups padded to tiles, and dropped tokens are spelt like this.
"""

from aquila_jax.kernels.backend import Backend
from aquila_jax.kernels.grouped_matmul import GroupedBackend, grouped_matmul
from aquila_jax.kernels.permute import permute, unpermute
from aquila_jax.kernels.route import route
from aquila_jax.kernels.spec import TINY, Routed, Scores

__all__ = [
    "TINY",
    "Backend",
    "GroupedBackend",
    "Routed",
    "Scores",
    "grouped_matmul",
    "permute",
    "route",
    "unpermute",
]
