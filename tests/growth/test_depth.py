import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aquila_jax.growth.depth import interpolation, stacking


def test_interpolation_of_24_to_32_repeats_every_third_layer():
    # floor(l * 24 / 32): three source layers become four.
    expected = [
        layer for start in range(0, 24, 3) for layer in (start, start, start + 1, start + 2)
    ]
    assert interpolation(24, 32).tolist() == expected


def test_interpolation_of_32_to_40_repeats_every_fourth_layer():
    # floor(l * 32 / 40): four source layers become five.
    offsets = (0, 0, 1, 2, 3)
    expected = [start + offset for start in range(0, 32, 4) for offset in offsets]
    assert interpolation(32, 40).tolist() == expected


def test_stacking_starts_again_from_the_first_layer():
    assert stacking(24, 32).tolist() == [*range(24), *range(8)]
    assert stacking(32, 40).tolist() == [*range(32), *range(8)]


@given(source=st.integers(1, 50), extra=st.integers(0, 120))
def test_every_source_layer_is_used_and_a_depth_that_does_not_grow_is_kept(source, extra):
    for depth_map in (stacking, interpolation):
        assert set(depth_map(source, source + extra).tolist()) == set(range(source))
        assert depth_map(source, source).tolist() == list(range(source))


@given(source=st.integers(1, 50), extra=st.integers(0, 120))
def test_interpolation_keeps_the_order_and_repeats_evenly(source, extra):
    layers = interpolation(source, source + extra)
    assert sorted(layers) == layers.tolist()
    counts = np.bincount(layers)
    assert counts.max() - counts.min() <= 1
