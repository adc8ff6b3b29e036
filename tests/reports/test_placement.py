import numpy as np
import pytest

from aquila_jax.reports.placement import densify, place_labels


def overlap(a, b, size):
    return abs(a[0] - b[0]) < size[0] and abs(a[1] - b[1]) < size[1]


@pytest.mark.parametrize("count", [2, 4, 7])
def test_labels_of_one_point_do_not_overlap(count):
    size = (40.0, 14.0)
    places = place_labels([(300.0, 150.0)] * count, [size] * count, np.zeros((0, 2)), (600, 300))
    for k, one in enumerate(places):
        assert not any(overlap(one, other, size) for other in places[:k])


def test_labels_stay_inside():
    ((x, y),) = place_labels([(598.0, 297.0)], [(40.0, 14.0)], np.zeros((0, 2)), (600, 300))
    assert x + 20 <= 600
    assert y + 7 <= 300


def test_labels_leave_lines_free():
    line = densify(np.array([[0.0, 100.0], [300.0, 100.0], [400.0, 100.0]]))
    ((x, y),) = place_labels([(300.0, 100.0)], [(40.0, 14.0)], line, (600, 300))
    covered = (abs(line[:, 0] - x) < 20) & (abs(line[:, 1] - y) < 7)
    assert not covered.any()


def test_densify_keeps_ends_and_spacing():
    points = np.array([[0.0, 0.0], [30.0, 40.0], [30.0, 40.0]])
    dense = densify(points, 4.0)
    np.testing.assert_allclose(dense[[0, -1]], points[[0, -1]])
    assert np.hypot(*np.diff(dense, axis=0).T).max() <= 4.0
