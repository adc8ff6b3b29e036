"""Drawings, as a browser and a pointer find them."""

import json

from .reading import read


def test_pointer_data_is_json_of_what_was_logged(page):
    data = [value for name, value in read(page).attributes if name == "data-points"]
    series = [line for text in data for line in json.loads(text)]
    last = [s for s in series if s["label"] == "3 scale-out" and s["name"] == "validation loss"]
    x, y, *told = last[0]["points"][-1]
    assert told == [500, "6.40e13", "3.620"]
    assert 0 < x < 1040
    assert 0 < y < 460


def test_drawings_hold_no_nan(page):
    drawn = [v for name, v in read(page).attributes if name in ("d", "cx", "cy", "x", "y")]
    assert drawn
    assert not any("nan" in value.lower() or "inf" in value.lower() for value in drawn)
