import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np
import pytest

from aquila_jax import UserError, scale_out, scale_up
from aquila_jax.axes import abstract_params, flatten, unflatten
from aquila_jax.growth import ScaleUp
from aquila_jax.growth.compose import apply_plan, check_plan
from aquila_jax.growth.rules import Fresh, Mapped

UNEVEN = {"embed_dim": 18, "num_heads": 6, "mlp_dim": 28, "num_layers": 5}


def growths(config):
    """Every growth of `config`, as a function of its parameters alone."""
    target = dataclasses.replace(config, **UNEVEN)
    up = functools.partial(scale_up, config=config, target_config=target)
    return {
        "fpi": functools.partial(up, method="fpi"),
        "aki": functools.partial(up, method="aki"),
        "aki_pro": functools.partial(up, method="aki_pro"),
        "scale_out": functools.partial(scale_out, config=config, key=jax.random.key(0)),
    }


METHODS = ["fpi", "aki", "aki_pro", "scale_out"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_eager_jitted_and_abstract_growth_agree(tiny, random_params, method, dtype):
    grow, params = growths(tiny)[method], random_params(tiny, dtype=dtype)
    eager, jitted, abstract = grow(params), jax.jit(grow)(params), jax.eval_shape(grow, params)
    jax.tree.map(np.testing.assert_array_equal, eager.params, jitted.params)
    expected = abstract_params(eager.config, dtype)
    for result in (eager, jitted, abstract):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), result.params)
        assert shapes == expected
        assert (result.config, result.certificate) == (eager.config, eager.certificate)


@pytest.mark.parametrize("method", METHODS)
def test_growth_takes_read_only_arrays_and_leaves_them_alone(tiny, random_params, method):
    params = random_params(tiny)
    for leaf in jax.tree.leaves(params):
        leaf.flags.writeable = False
    before = {path: (id(leaf), leaf.tobytes()) for path, leaf in flatten(params).items()}
    growths(tiny)[method](params)
    assert {path: (id(leaf), leaf.tobytes()) for path, leaf in flatten(params).items()} == before


def test_bfloat16_is_divided_in_float32(tiny, random_params):
    target = dataclasses.replace(tiny, embed_dim=36)
    params = random_params(tiny, dtype=ml_dtypes.bfloat16)
    grown = scale_up(params, tiny, target, method="fpi").params["lm_head"]["kernel"]
    kernel = params["lm_head"]["kernel"].astype(np.float32)
    thirds = (kernel * np.float32(1 / 3)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(grown, np.tile(thirds, (3, 1)))


@pytest.mark.parametrize("method", METHODS)
def test_a_certificate_tells_the_origin_of_every_leaf(tiny, random_params, method):
    params = random_params(tiny)
    grown = growths(tiny)[method](params)
    assert grown.certificate.source == tiny
    assert grown.certificate.target == grown.config
    leaves = flatten(grown.params)
    assert {leaf.path: leaf.shape for leaf in grown.certificate.leaves} == {
        path: leaf.shape for path, leaf in leaves.items()
    }
    source = flatten(params)
    for record in grown.certificate.leaves:
        assert (record.source is None) == (record.origin == "fresh")
        if record.source is not None:
            same_values = np.isin(leaves[record.path], source[record.source]).all()
            assert same_values == ("scaled" not in record.how), record
            mixed = "layer above" in record.how
            assert record.origin == ("mapped" if mixed or not same_values else "copied"), record
        assert record.path in str(grown.certificate)
    assert {leaf.source for leaf in grown.certificate.leaves} - {None} == set(source)


def test_a_fresh_leaf_needs_a_key(tiny, random_params):
    plan = {**ScaleUp("fpi").plan(tiny, tiny)[0], "layers/mlp/up": Fresh(0.1)}
    with pytest.raises(UserError, match=r"layers/mlp/up is drawn at random: pass key"):
        apply_plan(plan, random_params(tiny), tiny, key=None)


def broken(change, tiny):
    target = dataclasses.replace(tiny, **UNEVEN)
    plan, _ = ScaleUp("fpi").plan(tiny, target)
    plan = dict(plan)
    change(plan)
    with pytest.raises(UserError) as error:
        check_plan(plan, tiny, target)
    return str(error.value)


def test_a_plan_without_a_rule_for_a_leaf_is_refused(tiny):
    message = broken(lambda plan: plan.pop("layers/mlp/up"), tiny)
    assert "target leaves without a rule: ['layers/mlp/up']" in message
    assert "source leaves that nothing uses: ['layers/mlp/up']" in message


def test_a_plan_with_a_rule_for_no_leaf_is_refused(tiny):
    message = broken(lambda plan: plan.update({"layers/mlp/side": Fresh(1.0)}), tiny)
    assert message.endswith("rules for leaves the target lacks: ['layers/mlp/side']")


def test_a_plan_that_leaves_a_source_leaf_unused_is_refused(tiny):
    message = broken(lambda plan: plan.update({"lm_head/kernel": Fresh(1.0)}), tiny)
    assert message.endswith("source leaves that nothing uses: ['lm_head/kernel']")


def test_a_plan_that_reads_what_is_not_there_is_refused(tiny):
    message = broken(lambda plan: plan.update({"final_norm/scale": Mapped("norm/scale")}), tiny)
    assert "rules that read leaves the source lacks: ['norm/scale']" in message
    assert "source leaves that nothing uses: ['final_norm/scale']" in message


@pytest.mark.parametrize("method", METHODS)
def test_source_parameters_that_are_not_their_configs_are_refused(tiny, random_params, method):
    grow, flat = growths(tiny)[method], flatten(random_params(tiny))

    def refusal(changed):
        with pytest.raises(UserError) as error:
            grow(unflatten(changed))
        return str(error.value)

    message = refusal({path: leaf for path, leaf in flat.items() if "query" not in path})
    assert "lack ['layers/attention/query', 'layers/attention/query_bias']" in message
    message = refusal({**flat, "layers/attention/gate": flat["final_norm/scale"]})
    assert "hold ['layers/attention/gate']" in message
    message = refusal({**flat, "layers/mlp/up": flat["layers/mlp/down"]})
    assert "layers/mlp/up has shape (3, 20, 12)" in message
    assert "(3, 12, 20)" in message
