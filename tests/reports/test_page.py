import json
import re
from html.parser import HTMLParser

import pytest

from aquila_jax.reports import read_run, write_page

from .synthetic import certificate, four_runs, stage, write_run

VOID = {"meta", "input", "br"}


class Reader(HTMLParser):
    """Checks that tags are balanced; keeps the text and what scripts and attributes hold."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    runs = [read_run(directory) for directory in four_runs(root)]
    return write_page(runs, root / "report.html", flops_note="Counted so.")


def test_is_well_formed_and_whole(page):
    reader = read(page)
    text = " ".join(reader.text)
    for expected in (
        *("Growing won: 3.620 against 3.790", "Counted so.", "What each growth did"),
        *("Validation loss, en", "Validation loss, zh", "Learning rate", "Gradient norm"),
        *("Tokens per second", "Load-balance loss", "Router z loss", "Versions and machine"),
        *("layers/attention/query", "sparse_upcycling", "num experts", "0.10.2"),
    ):
        assert expected in text, expected
    assert reader.tags.count("details") == 2
    assert reader.tags.count("h1") == 1


def test_loads_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert "//" not in re.sub(r"<script>.*</script>", "", text, flags=re.S)
    assert "@import" not in text
    assert "url(" not in text
    names = {name for name, _ in read(page).attributes}
    assert not names & {"src", "href", "srcset"}


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


def test_hostile_names_are_only_text(tmp_path):
    evil = "<script>alert(1)</script>'\"&"
    told = certificate(evil, False, {evil: 1}, {evil: evil})
    told["leaves"][0] |= {"path": evil, "origin": evil, "how": evil, "source": evil}
    entries = [
        stage(evil, validation_start={evil: 9.0, "zh": 8.0}, validation_end={evil: 4.0, "zh": 3.0}),
        stage(evil, "scale_up", model={"num_layers": evil}, method=evil),
    ]
    directory = write_run(tmp_path / "run", entries, certificate=told, environment={evil: [evil]})
    reader = read(write_page([read_run(directory)], tmp_path / "report.html"))
    assert reader.tags.count("script") == 1
    assert evil in " ".join(reader.text)


def test_what_a_certificate_measured_is_told(tmp_path):
    told = certificate("latent", True, {"embed_dim": 4}, {"embed_dim": 6})
    told["measured"] = {
        "num_tokens": 254,
        "max_logit_difference": 3.2e-5,
        "kl": 1.5e-9,
        "source_loss": 4.25,
        "grown_loss": 4.25,
    }
    entries = [stage(), stage("wide", "scale_up", method="latent")]
    directory = write_run(tmp_path / "run", entries, certificate=told)
    text = " ".join(read(write_page([read_run(directory)], tmp_path / "report.html")).text)
    assert "a probe of 254 predictions" in text
    assert "KL 1.5e-09 nats, logits at most 3.2e-05 apart" in text


def test_unfinished_run_without_any_row(tmp_path):
    directory = write_run(tmp_path / "run", [stage(steps=0, validation_end=None)], [])
    text = " ".join(read(write_page([read_run(directory)], tmp_path / "report.html")).text)
    assert "1 dense is unfinished: step 0 of 500" in text
