import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquila_jax import UserError
from aquila_jax.growth.depth import DEPTH_MAPS, identity, interpolation, solar, stacking


def test_interpolation_of_24_to_32_repeats_every_third_layer():
    # floor(l * 24 / 32): three source layers become four.
    expected = [
        layer for start in range(0, 24, 3) for layer in (start, start, start + 1, start + 2)
    ]
    assert interpolation(24, 32).layers.tolist() == expected


def test_interpolation_of_32_to_40_repeats_every_fourth_layer():
    # floor(l * 32 / 40): four source layers become five.
    offsets = (0, 0, 1, 2, 3)
    expected = [start + offset for start in range(0, 32, 4) for offset in offsets]
    assert interpolation(32, 40).layers.tolist() == expected


def test_stacking_starts_again_from_the_first_layer():
    assert stacking(24, 32).layers.tolist() == [*range(24), *range(8)]
    assert stacking(32, 40).layers.tolist() == [*range(32), *range(8)]


@given(source=st.integers(1, 50), extra=st.integers(0, 120))
def test_every_source_layer_is_used_and_a_depth_that_does_not_grow_is_kept(source, extra):
    for name, depth_map in DEPTH_MAPS.items():
        if name == "solar":
            extra = min(extra, source)
        deeper = depth_map(source, source + extra)
        assert set(deeper.layers.tolist()) == set(range(source))
        assert len(deeper.layers) == len(deeper.silent) == source + extra
        assert deeper.is_exact == (extra == 0 or name == "identity")
        same = depth_map(source, source)
        assert same.layers.tolist() == list(range(source))
        assert not same.silent.any()


def test_solar_joins_the_first_layers_of_one_copy_to_the_last_of_another():
    # The paper's 32 layers, 8 left out of each copy, give 48.
    assert solar(32, 48).layers.tolist() == [*range(24), *range(8, 32)]
    assert solar(4, 7).layers.tolist() == [0, 1, 2, 3, 1, 2, 3]


def test_solar_refuses_more_than_two_copies():
    with pytest.raises(UserError, match=r"two copies of 3 layers.*at most 6, not 7"):
        solar(3, 7)


def test_identity_insertion_adds_silent_copies_after_the_layer_they_copy():
    deeper = identity(4, 6)
    assert deeper.layers.tolist() == [0, 0, 1, 2, 2, 3]
    assert deeper.silent.tolist() == [False, True, False, False, True, False]


@given(source=st.integers(1, 50), extra=st.integers(0, 120))
def test_interpolation_keeps_the_order_and_repeats_evenly(source, extra):
    layers = interpolation(source, source + extra).layers
    assert sorted(layers) == layers.tolist()
    counts = np.bincount(layers)
    assert counts.max() - counts.min() <= 1
