"""What cannot be computed is refused in one line; what is left of the rest has a defined result."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.errors import UserError
from aquila_jax.nn import Dispatch
from aquila_jax.nn.moe.experts import Weights
from aquila_jax.nn.moe.mixing import mix
from aquila_jax.nn.moe.queues import capacity_of
from aquila_jax.sharding import Layout, MeshShape

E, K, B, T = 4, 2, 8, 3
DROPLESS, REFERENCE = Dispatch(), Dispatch(strategy="reference")
# Room for every token at every expert, and for few.
ROOMY = Dispatch(strategy="capacity", capacity_factor=E / K)
TIGHT = Dispatch(strategy="capacity", capacity_factor=0.5, overflow=True)
SENT = Dispatch(exchange="all_to_all")
SPREAD = MeshShape(data=2, expert=4)
WAYS = [(DROPLESS, None), (ROOMY, None), (REFERENCE, None), (SENT, SPREAD)]
IDS = ["dropless", "slots", "reference", "sent"]


@functools.cache
def function(config, dispatch, mesh):
    layout = Layout(mesh.build()) if mesh else None

    def call(x_BTD, logits_BTE, is_token_BT, weights):
        bias_E = jnp.zeros(logits_BTE.shape[-1])
        return mix(config, dispatch, x_BTD, logits_BTE, is_token_BT, bias_E, weights, layout)

    return jax.jit(call)


@pytest.fixture
def mixture(tiny):
    config = dataclasses.replace(tiny, num_experts=E, experts_per_token=K)
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(B, T, config.embed_dim)).astype(np.float32)
    logits_BTE = rng.normal(size=(B, T, E)).astype(np.float32)
    gate, up = rng.normal(size=(2, E, config.embed_dim, config.mlp_dim)).astype(np.float32)
    weights = Weights(gate, up, gate.swapaxes(1, 2))
    return config, x_BTD, logits_BTE, np.ones((B, T), bool), weights


def evaluate(config, dispatch, mesh, *arrays):
    out, report = jax.device_get(function(config, dispatch, mesh)(*arrays))
    return out, report


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity_factor": 0.0}, r"capacity_factor \(0.0\) must be above 0.*1.25 is usual"),
        ({"capacity_factor": float("nan")}, r"capacity_factor \(nan\) must be above 0"),
        ({"buffer_factor": 0.5}, r"buffer_factor \(0.5\) must be 0, room for all, or at least 1"),
        ({"jitter": 1.0}, r"jitter \(1.0\) must be at least 0 and below 1"),
        ({"strategy": "capasity"}, "must be one of dropless, capacity, reference, not 'capasity'"),
        ({"exchange": "pigeon"}, "must be one of auto, all_to_all, gather, not 'pigeon'"),
    ],
)
def test_settings_out_of_range_are_named_with_their_value_and_range(settings, message):
    with pytest.raises(UserError, match=message):
        Dispatch(**settings)


@pytest.mark.parametrize("k", [0, E + 1])
def test_a_token_visits_between_one_and_all_experts(tiny, k):
    with pytest.raises(UserError, match=rf"experts_per_token \({k}\) .* num_experts \({E}\)"):
        dataclasses.replace(tiny, num_experts=E, experts_per_token=k)


def test_experts_that_do_not_divide_over_their_devices_are_refused(mixture):
    config, x_BTD, logits_BTE, is_token_BT, weights = mixture
    config = dataclasses.replace(config, num_experts=3)
    fewer = [x[:3] for x in weights]
    with pytest.raises(UserError, match="experts of 3 do not divide over the 4 devices"):
        evaluate(config, SENT, SPREAD, x_BTD, logits_BTE[..., :3], is_token_BT, Weights(*fewer))
    with pytest.raises(UserError, match="experts of 3 does not divide over the 4 devices"):
        Layout(SPREAD.build()).params(config)


@pytest.mark.parametrize(("dispatch", "mesh"), WAYS, ids=IDS)
def test_logits_that_are_not_numbers_are_counted_and_spoil_their_own_token_alone(
    mixture, dispatch, mesh
):
    config, x_BTD, logits_BTE, is_token_BT, weights = mixture
    bad = np.zeros((B, T), bool)
    bad[0, 1] = bad[5, 0] = True
    spoilt_BTE = np.where(bad[..., None], np.float32(np.nan), logits_BTE)
    spoilt_BTE[5, 0, 1:] = 0
    expected, _ = evaluate(config, dispatch, mesh, x_BTD, logits_BTE, is_token_BT, weights)
    runs = [
        evaluate(config, dispatch, mesh, x_BTD, spoilt_BTE, is_token_BT, weights) for _ in range(2)
    ]
    out, report = runs[0]
    assert report.not_finite == bad.sum()
    np.testing.assert_allclose(out[~bad], expected[~bad], rtol=1e-5, atol=1e-5)
    assert np.isnan(out[bad]).all()
    np.testing.assert_allclose(report.load_E.sum(), 1, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, *runs)


def test_padding_may_hold_what_is_not_a_number(mixture):
    config, x_BTD, logits_BTE, is_token_BT, weights = mixture
    is_token_BT[2:4] = False
    spoilt_BTE = np.where(is_token_BT[..., None], logits_BTE, np.nan)
    for dispatch in (DROPLESS, ROOMY, REFERENCE):
        arrays = (is_token_BT, weights)
        out, report = evaluate(config, dispatch, None, x_BTD, spoilt_BTE, *arrays)
        expected, clean = evaluate(config, dispatch, None, x_BTD, logits_BTE, *arrays)
        assert report.not_finite == 0
        np.testing.assert_array_equal(out[is_token_BT], expected[is_token_BT])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), report, clean)


@pytest.mark.parametrize(
    ("dispatch", "mesh"),
    [(SENT, SPREAD), (Dispatch(exchange="gather"), SPREAD), (ROOMY, SPREAD)],
    ids=["sent", "gathered", "slots"],
)
def test_devices_without_a_real_token_change_nothing_for_the_others(mixture, dispatch, mesh):
    config, x_BTD, logits_BTE, is_token_BT, weights = mixture
    is_token_BT[:6] = False  # 8 devices hold a row each
    arrays = (x_BTD, logits_BTE, is_token_BT, weights)
    out, report = evaluate(config, dispatch, mesh, *arrays)
    expected, same = evaluate(config, REFERENCE, None, *arrays)
    np.testing.assert_allclose(out[6:], expected[6:], rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), report, same)


@pytest.mark.parametrize("dispatch", [DROPLESS, ROOMY, TIGHT, REFERENCE], ids=repr)
@pytest.mark.parametrize("shape", [(0, T), (B, 0)], ids=["no rows", "no columns"])
def test_no_tokens_give_no_outputs_and_a_report_of_zeros(mixture, dispatch, shape):
    config, _, _, _, weights = mixture
    out, report = evaluate(
        config,
        dispatch,
        None,
        np.zeros((*shape, config.embed_dim), np.float32),
        np.zeros((*shape, E), np.float32),
        np.zeros(shape, bool),
        weights,
    )
    assert out.shape == (*shape, config.embed_dim)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), report)


def test_an_expert_has_a_slot_where_there_is_a_token():
    assert capacity_of(1e-9, num_tokens=3, experts_per_token=1, num_experts=8) == 1
    assert capacity_of(1e9, num_tokens=3, experts_per_token=1, num_experts=8) == 3
    assert capacity_of(1.25, num_tokens=0, experts_per_token=1, num_experts=8) == 0
