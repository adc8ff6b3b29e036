"""The strategies of a mixture against the reference, which computes every expert on every token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax import preset
from aquila_jax.nn import Dispatch
from aquila_jax.nn.moe import mixing
from aquila_jax.nn.moe.experts import Weights
from aquila_jax.nn.moe.mixing import filled_share, mix
from aquila_jax.sharding import Layout, MeshShape

E, K, B, T = 4, 2, 8, 12
REFERENCE = Dispatch(strategy="reference")
# Room for every token at every expert.
ROOMY = Dispatch(strategy="capacity", capacity_factor=E / K)
SPREAD = MeshShape(data=2, expert=4)


@functools.cache
def function(config, dispatch, mesh):
    """Outputs and report of real tokens, and the gradients of a number made of all of it."""
    layout = Layout(mesh.build()) if mesh else None

    def number(differentiable, is_token_BT, by_BTD):
        x_BTD, logits_BTE, weights = differentiable
        bias_E = jnp.zeros(E, x_BTD.dtype)
        out_BTD, report = mix(
            config, dispatch, x_BTD, logits_BTE, is_token_BT, bias_E, weights, layout
        )
        # What padding says is nobody's concern: with fixed slots no expert hears it.
        out_BTD = jnp.where(is_token_BT[..., None], out_BTD, 0)
        charged = report.load_balance_loss + 0.1 * report.router_z_loss + report.router_max_z_loss
        return jnp.sum(out_BTD * by_BTD) + charged, (out_BTD, report)

    return jax.jit(jax.value_and_grad(number, has_aux=True))


@pytest.fixture
def mixture(tiny):
    config = dataclasses.replace(tiny, num_experts=E, experts_per_token=K)
    rng = np.random.default_rng(0)
    shapes = {"x": config.embed_dim, "logits": E, "by": config.embed_dim}
    x_BTD, logits_BTE, by_BTD = (rng.normal(size=(B, T, size)) for size in shapes.values())
    matrix = (E, config.embed_dim, config.mlp_dim)
    matrices: list[Any] = [rng.normal(size=matrix) for _ in range(3)]
    # One expert is everybody's favourite, and a third of a row is padding.
    logits_BTE[..., 1] += 1.5
    is_token_BT = np.arange(T)[None] < np.arange(T, T - B, -1)[:, None]
    gate_EDF, up_EDF, down_EDF = matrices
    weights = Weights(gate_EDF, up_EDF, down_EDF.swapaxes(1, 2))
    return config, ((x_BTD, logits_BTE, weights), is_token_BT, by_BTD)


def evaluate(mixture, dispatch, mesh=None):
    config, arguments = mixture
    with jax.enable_x64(True):
        return jax.device_get(function(config, dispatch, mesh)(*arguments))


@pytest.mark.parametrize(
    ("dispatch", "mesh"),
    [
        (Dispatch(), None),
        (ROOMY, None),
        (Dispatch(exchange="all_to_all"), SPREAD),
        (Dispatch(exchange="gather"), SPREAD),
        (Dispatch(exchange="all_to_all"), MeshShape(expert=4, model=2)),
        (Dispatch(exchange="gather"), MeshShape(expert=4, model=2)),
        (dataclasses.replace(ROOMY, exchange="all_to_all"), SPREAD),
        (dataclasses.replace(ROOMY, exchange="gather"), SPREAD),
    ],
    ids=["dropless", "slots", *("sent", "gathered", "sent in parts", "gathered in parts"),
         *("slots sent", "slots gathered")],
)  # fmt: skip
def test_gives_the_outputs_the_gradients_and_the_report_of_the_reference(mixture, dispatch, mesh):
    found, expected = evaluate(mixture, dispatch, mesh), evaluate(mixture, REFERENCE)
    assert found[0][1][1].dropped_fraction == 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), found, expected
    )


def test_single_tokens_of_many_rows_are_shared_among_hidden_shards(mixture, caplog):
    """As while texts are generated: one token of a row does not divide over two devices."""
    config, ((x_BTD, logits_BTE, weights), is_token_BT, by_BTD) = mixture
    single = (x_BTD[:, :1], logits_BTE[:, :1], weights), is_token_BT[:, :1], by_BTD[:, :1]
    mesh = MeshShape(expert=4, model=2)
    found, expected = (
        evaluate((config, single), dispatch, over)
        for dispatch, over in ((Dispatch(), mesh), (REFERENCE, None))
    )
    assert not caplog.records
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), found, expected
    )


def test_without_room_tokens_are_dropped_and_counted(mixture):
    _, arguments = mixture
    real = arguments[1].sum()
    tight = Dispatch(strategy="capacity", capacity_factor=0.5)
    (_, (_, report)), _ = evaluate(mixture, tight)
    served = (1 - report.dropped_fraction) * real * K
    # Half as many slots as pairs of tokens, real or not; an expert's own are no others'.
    assert served <= 0.5 * B * T * K + 1e-6
    np.testing.assert_allclose(served, round(served), atol=1e-9)


def test_overflow_serves_at_the_next_best_expert_what_the_best_had_no_room_for(mixture):
    just_enough = Dispatch(strategy="capacity", capacity_factor=1.0)
    (_, (_, lost)), _ = evaluate(mixture, just_enough)
    (_, (_, kept)), _ = evaluate(mixture, dataclasses.replace(just_enough, overflow=True))
    assert kept.dropped_fraction < lost.dropped_fraction


def skewed(mixture, k, favourite):
    """The mixture with k choices, of which half of the batch makes one alike."""
    config, ((x_BTD, logits_BTE, weights), *rest) = mixture
    logits_BTE = logits_BTE.copy()
    logits_BTE[: B // 2, :, favourite] += 50
    config = dataclasses.replace(config, experts_per_token=k)
    return config, ((x_BTD, logits_BTE, weights), *rest)


MESHES = {
    "rows": SPREAD,
    "units": MeshShape(expert=4, model=2),
    # Tokens of one half need more rounds than the others, and each has half of all weights.
    "weights": MeshShape(data=1, fsdp=2, expert=4),
}
ROUNDS = [(exchange, 1, mesh) for exchange in ("all_to_all", "gather") for mesh in MESHES]


@pytest.mark.parametrize(("exchange", "k", "mesh"), [*ROUNDS, ("all_to_all", 2, "rows")])
def test_what_finds_no_room_comes_in_further_rounds(mixture, exchange, k, mesh, monkeypatch):
    """Room for the average; of one choice each, one device gets up to four times that."""
    monkeypatch.setattr(mixing, "_FEWEST_ROWS", 1)
    tight = Dispatch(exchange=exchange, buffer_factor=1.0)
    chosen = skewed(mixture, k, favourite=2)
    found, expected = evaluate(chosen, tight, MESHES[mesh]), evaluate(chosen, REFERENCE)
    assert found[0][1][1].dropped_fraction == 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), found, expected
    )


def test_few_rows_come_in_one_round_wherever_they_go(mixture, monkeypatch):
    """A token at a time, as texts are generated, would pay for each round with all weights."""

    def loops(factor):
        config, arguments = mixture
        dispatch = Dispatch(exchange="all_to_all", buffer_factor=factor)
        program = function.__wrapped__(config, dispatch, SPREAD).trace(*arguments).jaxpr
        return str(program).count("while[")

    in_one_round = loops(0.0)
    assert loops(1.0) == in_one_round
    monkeypatch.setattr(mixing, "_FEWEST_ROWS", 1)
    assert loops(1.0) > in_one_round == loops(0.0)


@pytest.mark.parametrize(
    ("expert", "settings", "share"),
    [
        (1, {}, 1.0),
        (2, {}, 1 / 1.5),
        (4, {}, 1 / 1.5),
        (4, {"buffer_factor": 0.0}, 0.5),
        (4, {"buffer_factor": 1.6}, 0.625),
    ],
)
def test_the_share_of_a_buffer_that_is_filled(expert, settings, share):
    """k of 2 among 4 experts: all rows may choose 2 here, or where one is here, that one."""
    config = dataclasses.replace(preset("toy_dense"), num_experts=4, experts_per_token=2)
    layout = Layout(MeshShape(data=-1, expert=expert).build())
    assert filled_share(config, Dispatch(**settings), layout) == pytest.approx(share, rel=1e-3)
    assert filled_share(config, Dispatch(strategy="capacity"), layout) == 1
