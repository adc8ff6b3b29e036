import jax.numpy as jnp
import numpy as np

from aquila_jax.nn.moe.health import balance_biases, expert_similarity, router_metrics

L, E, D, F = 2, 4, 6, 5


def params(weights):
    return {"layers": {"moe": dict(zip(("gate", "up", "down"), weights, strict=True))}}


def test_similarity_is_the_mean_cosine_of_all_pairs_of_experts():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(L, E, D, F)) for _ in range(3)]
    expected = []
    for layer in range(L):
        cosines = []
        for matrix in weights:
            flat = matrix[layer].reshape(E, -1)
            flat /= np.linalg.norm(flat, axis=1, keepdims=True)
            cosines += [flat[i] @ flat[j] for i in range(E) for j in range(i)]
        expected.append(np.mean(cosines))
    found = expert_similarity(params([jnp.asarray(matrix, jnp.float32) for matrix in weights]))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_copies_are_alike_opposites_are_not_and_one_expert_is_like_itself():
    one = np.random.default_rng(1).normal(size=(L, 1, D, F)).astype(np.float32)
    assert expert_similarity(params([jnp.asarray(one)] * 3)).tolist() == [1.0, 1.0]
    copies = jnp.asarray(np.repeat(one, E, axis=1))
    np.testing.assert_allclose(expert_similarity(params([copies] * 3)), 1, rtol=1e-6)
    opposites = jnp.asarray(np.concatenate([one, -one], axis=1))
    np.testing.assert_allclose(expert_similarity(params([opposites] * 3)), -1, rtol=1e-6)


def test_biases_go_against_the_load_by_the_rate_and_nothing_else_moves():
    before = {"layers": {"moe": {"router_bias": jnp.zeros((1, 4)), "gate": jnp.ones(3)}}}
    load = jnp.array([[0.5, 0.25, 0.2, 0.05]])
    after = balance_biases(before, load, 0.01)
    np.testing.assert_allclose(
        after["layers"]["moe"]["router_bias"], [[-0.01, 0, 0.01, 0.01]], rtol=1e-6
    )
    assert after["layers"]["moe"]["gate"] is before["layers"]["moe"]["gate"]
    assert before["layers"]["moe"]["router_bias"].sum() == 0


def test_metrics_are_means_over_layers_and_loads_are_multiples_of_the_average():
    names = ("load_balance_loss", "router_z_loss", "router_max_z_loss", "router_entropy")
    names += ("gate_confidence", "dropped_fraction")
    reports = {name: jnp.array([1.0, 3.0]) for name in names}
    reports["load_E"] = jnp.array([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.2, 0.0]])
    reports["not_finite"] = jnp.array([0.0, 2.0])
    metrics = router_metrics(reports)
    assert all(metrics[name] == 2 for name in names)
    np.testing.assert_allclose(metrics["busiest_expert_load"], 2.8, rtol=1e-6)
    assert metrics["idlest_expert_load"] == 0
    assert metrics["router_not_finite"] == 2
    assert metrics["router_entropy_by_layer"].tolist() == [1, 3]
