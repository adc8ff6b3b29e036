import dataclasses

import pytest

from aquila_jax import UserError, axes
from aquila_jax.training.assignment import assign, check_map

from .synthetic import MIXTURE, TINY, WIDER

TIED = dataclasses.replace(TINY, tie_embeddings=True)
UNBIASED = dataclasses.replace(TINY, qkv_bias=False)
BIASES = ("layers/attention/query_bias", "layers/attention/key_bias", "layers/attention/value_bias")


def test_equal_models_share_every_leaf_and_need_no_words():
    assignment = assign(TINY, TINY)
    assert dict(assignment.sources) == {leaf: leaf for leaf in axes.parameters(TINY)}
    assert str(assignment) == ""


def test_the_first_pattern_that_matches_a_whole_path_counts():
    swap = ((r"(.*)/key", r"\1/value"), (r".*/key", None), (r"(.*)/value", r"\1/key"))
    sources = assign(TINY, TINY, swap).sources
    assert sources["layers/attention/key"] == "layers/attention/value"
    assert sources["layers/attention/value"] == "layers/attention/key"
    assert sources["layers/attention/key_bias"] == "layers/attention/key_bias"


@pytest.mark.parametrize(
    ("assignment_map", "allow_missing"), [(((r".*_bias", None),), False), ((), True)]
)
def test_leaves_that_the_source_lacks_are_fresh_where_that_is_allowed(
    assignment_map, allow_missing
):
    assignment = assign(TINY, UNBIASED, assignment_map, allow_missing=allow_missing)
    assert set(assignment.fresh) == set(BIASES)
    assert assignment.unused == ()
    assert str(assignment).startswith("freshly initialised: layers/attention/query_bias")


@pytest.mark.parametrize(
    ("assignment_map", "allow_missing"), [(((r"lm_head/.*", None),), False), ((), True)]
)
def test_leaves_that_nothing_uses_are_left_where_that_is_allowed(assignment_map, allow_missing):
    assignment = assign(TIED, TINY, assignment_map, allow_missing=allow_missing)
    assert assignment.unused == ("lm_head/kernel",)
    assert assignment.fresh == ()
    assert str(assignment) == "unused: lm_head/kernel"


@pytest.mark.parametrize(
    ("wanted", "found", "assignment_map", "words"),
    [
        (TINY, UNBIASED, (), r"missing there: layers/attention/query_bias \(as .*allow_missing"),
        (TIED, TINY, (), "used by nothing: lm_head/kernel"),
        (
            TINY,
            WIDER,
            (),
            r"attention/out \(2, 2, 8, 16\) from layers/attention/out \(3, 3, 8, 24\)",
        ),
        (TINY, TINY, ((r".*/key", "layers/keys"),), r"attention/key \(as layers/keys\)"),
        (TINY, TINY, ((r".*/query_bias", None),), None),
        (MIXTURE, WIDER, ((r".*/moe/.*", None),), "used by nothing: layers/mlp/gate"),
    ],
)
def test_what_does_not_fit_is_listed(wanted, found, assignment_map, words):
    if words is None:
        assert assign(wanted, found, assignment_map).fresh == ("layers/attention/query_bias",)
        return
    with pytest.raises(UserError, match=words) as error:
        assign(wanted, found, assignment_map)
    assert "\n" not in str(error.value)


def test_another_shape_is_refused_even_where_leaves_may_be_missing():
    with pytest.raises(UserError, match="of another shape: token_embedder/embedding"):
        assign(TINY, WIDER, allow_missing=True)


@pytest.mark.parametrize(
    ("assignment_map", "words"),
    [
        ((("(", "x"),), "is no regular expression"),
        ((("a",),), "give pairs"),
        (("ab",), "give pairs"),
        ((("a", 3),), "give a path or None"),
        (((r"(a)", r"\2"),), "names a group"),
    ],
)
def test_a_map_that_is_none_is_refused(assignment_map, words):
    with pytest.raises(UserError, match=words):
        check_map(assignment_map)
