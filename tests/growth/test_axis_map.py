import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aquila_jax import preset
from aquila_jax.growth.axis_map import circular, width_maps, within_groups

growing = st.tuples(st.integers(1, 50), st.integers(0, 70)).map(lambda n: (n[0], n[0] + n[1]))


@given(sizes=growing, groups=st.integers(1, 6))
def test_width_maps_use_every_unit_and_count_its_copies(sizes, groups):
    source, target = sizes
    for axis_map, n in (
        (circular(source, target), source),
        (within_groups(groups, groups * source, groups * target), groups * source),
    ):
        assert set(axis_map.index.tolist()) == set(range(n))
        np.testing.assert_allclose(np.bincount(axis_map.index, 1 / axis_map.copies), 1)
        old = axis_map.index[~axis_map.is_new]
        np.testing.assert_array_equal(np.sort(old), np.arange(n))
        assert axis_map.is_identity == (source == target)


def test_the_papers_query_heads_grow_from_four_to_five_in_each_of_eight_groups():
    heads = width_maps(preset("aquila3_7b"), preset("aquila3_16b"))["q_heads"]
    grouped = heads.index.reshape(8, 5)
    for group in range(8):
        first = 4 * group
        assert grouped[group].tolist() == [first, first + 1, first + 2, first + 3, first]
    assert heads.is_new.reshape(8, 5).tolist() == [[False] * 4 + [True]] * 8
    assert heads.copies.reshape(8, 5).tolist() == [[2, 1, 1, 1, 2]] * 8
