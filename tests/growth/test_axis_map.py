import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aquila_jax import ModelConfig, preset
from aquila_jax.growth.axis_map import circular, width_maps, within_groups

growing = st.tuples(st.integers(1, 12), st.integers(0, 20)).map(lambda n: (n[0], n[0] + n[1]))


def heads(groups: int, per_group: int) -> ModelConfig:
    changes = {"num_kv_heads": groups, "num_heads": groups * per_group}
    return dataclasses.replace(preset("toy_dense"), **changes)


@given(sizes=growing, groups=growing)
def test_width_maps_use_every_unit_and_count_its_copies(sizes, groups):
    (source, target), heads_before = sizes, groups[0] * sizes[0]
    by_groups = within_groups(heads(groups[0], source), heads(groups[1], target))
    for axis_map, n in ((circular(source, target), source), (by_groups, heads_before)):
        assert set(axis_map.index.tolist()) == set(range(n))
        np.testing.assert_allclose(np.bincount(axis_map.index, 1 / axis_map.copies), 1)
        old = axis_map.index[~axis_map.is_new]
        np.testing.assert_array_equal(np.sort(old), np.arange(n))
    assert by_groups.is_identity == (source == target and groups[0] == groups[1])


@given(sizes=growing, groups=growing)
def test_a_query_head_stays_with_its_key_and_value(sizes, groups):
    source, target = heads(groups[0], sizes[0]), heads(groups[1], sizes[1])
    queries, keys = within_groups(source, target), circular(*groups)
    for head, taken in enumerate(queries.index):
        group = keys.index[head // target.heads_per_group]
        assert taken // source.heads_per_group == group


def test_the_papers_query_heads_grow_from_four_to_five_in_each_of_eight_groups():
    heads = width_maps(preset("aquila3_7b"), preset("aquila3_16b"))["q_heads"]
    grouped = heads.index.reshape(8, 5)
    for group in range(8):
        first = 4 * group
        assert grouped[group].tolist() == [first, first + 1, first + 2, first + 3, first]
    assert heads.is_new.reshape(8, 5).tolist() == [[False] * 4 + [True]] * 8
    assert heads.copies.reshape(8, 5).tolist() == [[2, 1, 1, 1, 2]] * 8
