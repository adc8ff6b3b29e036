"""Bytes of each exchange, counted by sending tokens one by one."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from aquila_jax.nn.moe.traffic import cheapest, traffic

SHAPE = {"embed_dim": 16, "hidden_dim": 24, "num_experts": 8, "bytes_per_element": 2}


def sent(exchange, tokens, k, expert_shards, hidden_shards):
    """Vectors that device (0, 0) receives, when every token's k pairs fall evenly on experts."""
    received = 0.0
    for x, h in itertools.product(range(expert_shards), range(hidden_shards)):
        for _ in range(tokens):
            if exchange == "gather":
                received += (x, h) != (0, 0)
            else:
                # Tokens of devices with the same experts, before rows are made of them.
                received += x == 0 and h != 0
                # Its own k rows, of which one in X is for the experts here; from other shards.
                received += k / expert_shards * (x != 0)
    return received


@pytest.mark.parametrize("exchange", ["gather", "all_to_all"])
@pytest.mark.parametrize(
    ("k", "expert_shards", "hidden_shards"), [(2, 4, 1), (2, 4, 2), (8, 2, 4), (1, 1, 4), (3, 8, 1)]
)
def test_it_is_what_sending_one_by_one_comes_to(exchange, k, expert_shards, hidden_shards):
    found = traffic(
        exchange, tokens=12, experts_per_token=k, expert_shards=expert_shards,
        hidden_shards=hidden_shards, **SHAPE,
    )  # fmt: skip
    vectors = sent(exchange, 12, k, expert_shards, hidden_shards)
    assert found.tokens == found.outputs == pytest.approx(vectors * 16 * 2)
    assert found.weights == 0
    assert found.total == found.tokens + found.outputs


def test_weights_come_from_the_devices_that_hold_the_rest_of_them():
    found = traffic(
        "gather", tokens=0, experts_per_token=2, expert_shards=2, hidden_shards=2, embed_shards=4,
        **SHAPE,
    )  # fmt: skip
    matrices = np.prod([3, 8, 16, 24]) / (2 * 2)
    assert found.weights == matrices * 3 / 4 * 2


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("expert_shards", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("hidden_shards", [1, 2, 4])
def test_the_cheapest_moves_least(k, expert_shards, hidden_shards):
    counts = {"expert_shards": expert_shards, "hidden_shards": hidden_shards}
    moved = {
        exchange: traffic(exchange, tokens=4, experts_per_token=k, **counts, **SHAPE).total
        for exchange in ("gather", "all_to_all")
    }
    assert moved[cheapest(k, expert_shards, hidden_shards)] == min(moved.values())


def test_the_documented_table_is_what_is_counted_and_chosen():
    page = Path(__file__).parents[3] / "docs" / "moe.md"
    rows = re.findall(r"^\| `(\w+)`, k = (\d) \|(.*)\|$", page.read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 4
    for exchange, k, cells in rows:
        for expert_shards, cell in zip((2, 4, 8, 16), cells.split("|"), strict=True):
            moved = traffic(
                exchange, tokens=16384, embed_dim=5120, hidden_dim=1, num_experts=16,
                experts_per_token=int(k), expert_shards=expert_shards,
            )  # fmt: skip
            is_chosen = cheapest(int(k), expert_shards, 1) == exchange
            figure = f"{moved.total / 1e9:.2f}"
            assert cell.strip() == (f"**{figure}**" if is_chosen else figure)
