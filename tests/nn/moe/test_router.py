import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels import route
from aquila_jax.nn.moe.queues import endless
from aquila_jax.nn.moe.router import report, sums_of

E = 4


def route_all(logits, is_token=None, k=2, balance="global", device_groups=1):
    """The report on tokens of these logits."""
    logits = jnp.asarray(logits, jnp.float32)
    is_token = jnp.ones(logits.shape[:2], bool) if is_token is None else jnp.asarray(is_token)
    routed = route(
        logits.reshape(-1, E),
        is_token.reshape(-1),
        experts_per_token=k,
        renormalize=True,
        sequences=logits.shape[0],
    )
    queues = endless(routed)
    sums = sums_of(logits, is_token, routed, queues, queues.order_Nk, k)
    return report(sums, k, balance, device_groups)


def random_logits(rows=3, tokens=7, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, tokens, E)).astype(np.float32)


def test_a_uniform_router_has_load_balance_one_and_z_log_experts_squared():
    routing = route_all(np.zeros((2, 5, E)), k=E)
    assert routing.load_balance_loss == pytest.approx(1, rel=1e-6)
    assert routing.router_z_loss == pytest.approx(np.log(E) ** 2, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_uniform_router_is_balanced_however_ties_are_broken(k):
    assert route_all(np.zeros((2, 5, E)), k=k).load_balance_loss == pytest.approx(1, rel=1e-6)


def test_all_tokens_to_one_expert_cost_the_number_of_experts():
    logits = np.zeros((2, 5, E))
    logits[..., 1] = 50
    routing = route_all(logits, k=1)
    assert routing.load_balance_loss == pytest.approx(E, rel=1e-6)
    np.testing.assert_array_equal(routing.load_E, [0, 1, 0, 0])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_losses_equal_their_formulas_token_by_token(k):
    logits = random_logits().astype(np.float64)
    counts, mean_probability, z = np.zeros(E), np.zeros(E), 0.0
    for token in logits.reshape(-1, E):
        probabilities = np.exp(token) / np.exp(token).sum()
        counts[np.argsort(-token)[:k]] += 1
        mean_probability += probabilities / 21
        z += np.log(np.exp(token).sum()) ** 2 / 21
    routing = route_all(logits, k=k)
    np.testing.assert_allclose(routing.load_E, counts / (21 * k), rtol=1e-6)
    expected = E * (counts / (21 * k)) @ mean_probability
    assert routing.load_balance_loss == pytest.approx(expected, rel=1e-5)
    assert routing.router_z_loss == pytest.approx(z, rel=1e-5)


def test_padding_is_neither_counted_nor_charged():
    logits = random_logits(rows=2, tokens=6)
    is_token = np.zeros((2, 6), bool)
    is_token[0], is_token[1, :2] = True, True
    alone = route_all(logits[is_token][None])
    logits[~is_token] = 100.0
    padded = route_all(logits, is_token)
    for name in ("load_balance_loss", "router_z_loss", "load_E"):
        np.testing.assert_allclose(getattr(padded, name), getattr(alone, name), rtol=1e-5)
