"""What each exchange moves: the table by which one is chosen."""

from typing import NamedTuple


class Traffic(NamedTuple):
    """Bytes that one device receives in one mixture's forward pass; backward is as much again.

    Attributes:
        weights: of experts, gathered over the devices that hold parts of their rows or columns;
            backward twice as much: gathered again, and gradients reduce-scattered.
        tokens: inputs to where they are computed.
        outputs: back.
    """

    weights: float
    tokens: float
    outputs: float

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.tokens + self.outputs


def traffic(
    exchange: str,
    *,
    tokens: int,
    embed_dim: int,
    hidden_dim: int,
    num_experts: int,
    experts_per_token: int,
    expert_shards: int,
    hidden_shards: int = 1,
    embed_shards: int = 1,
    bytes_per_element: int = 2,
) -> Traffic:
    """Bytes received by one device, when experts are balanced.

    With N tokens on a device, X expert shards, H shards of hidden units: "gather" brings all
    tokens of X H devices, N (X H - 1), and shares out as many sums. "all_to_all" brings the N
    (H - 1) tokens of the devices with the same experts, then N H k rows of which 1 / X are at
    home; and the same back.

    Args:
        exchange: "all_to_all" or "gather".
        tokens: N, of one device.
        embed_dim: D.
        hidden_dim: F of one expert.
        num_experts: E.
        experts_per_token: k.
        expert_shards: X.
        hidden_shards: H.
        embed_shards: over how many devices the D dimension of weights is split.
        bytes_per_element: of activations and of weights in use.
    """
    rows = _rows(exchange, experts_per_token, expert_shards, hidden_shards)
    moved = rows * tokens * embed_dim * bytes_per_element
    here = 3 * num_experts * embed_dim * hidden_dim / (expert_shards * hidden_shards)
    weights = here * (1 - 1 / embed_shards) * bytes_per_element
    return Traffic(weights, moved, moved)


def cheapest(experts_per_token: int, expert_shards: int, hidden_shards: int) -> str:
    """The exchange that moves fewer bytes: "gather" up to k expert shards, "all_to_all" beyond."""
    counts = (experts_per_token, expert_shards, hidden_shards)
    return min(("gather", "all_to_all"), key=lambda exchange: _rows(exchange, *counts))


def _rows(exchange: str, k: int, expert_shards: int, hidden_shards: int) -> float:
    """Rows received for every token of one's own."""
    if exchange == "gather":
        return expert_shards * hidden_shards - 1.0
    return hidden_shards - 1 + hidden_shards * k * (1 - 1 / expert_shards)
