import re

from aquila_jax.reports import read_run, write_page

from .reading import read
from .synthetic import certificate, stage, write_run


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


def test_unfinished_run_without_any_row(tmp_path):
    directory = write_run(tmp_path / "run", [stage(steps=0, validation_end=None)], [])
    text = " ".join(read(write_page([read_run(directory)], tmp_path / "report.html")).text)
    assert "1 dense is unfinished: step 0 of 500" in text
