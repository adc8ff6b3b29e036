import pytest

from aquila_jax.reports import read_run, stage_table

from .synthetic import four_runs, losses, stage, write_run


def cells(text: str) -> list[list[str]]:
    """Rows of the first block, by the two spaces between columns."""
    return [[c.strip() for c in line.split("  ") if c.strip()] for line in text.splitlines()]


def test_numbers_are_right(tmp_path):
    header, _, *rows = cells(stage_table([read_run(d) for d in four_runs(tmp_path)]))
    two = dict(zip(header, rows[1], strict=True))
    assert two == {
        "stage": "2 scale-up",
        "parameters": "5.48M",
        "active": "5.48M",
        "steps": "500",
        "tokens": "4.10M",
        "FLOPs": "2.10e13",
        "total FLOPs": "3.30e13",
        "time": "103 s",
        "start": "4.920",
        "end": "3.800",
        "start en": "5.020",
        "end en": "3.900",
        "start zh": "4.820",
        "end zh": "3.700",
    }
    assert rows[2][2] == "7.30M"
    assert rows[3][:1] + rows[3][6:7] == ["control moe", "6.40e13"]


def test_unfinished_is_told(tmp_path):
    directory = write_run(tmp_path / "run", [stage(steps=210, validation_end=None)])
    text = stage_table([read_run(directory)])
    assert "210/500" in text
    assert text.splitlines()[-1].startswith(
        "1 dense is unfinished: step 210 of 500, latest validation loss 8.8"
    )


def test_a_single_language_is_its_mean(tmp_path):
    one = {"en": 4.0, "mean": 4.0}
    entry = stage(validation_start=one, validation_end=one)
    header = cells(stage_table([read_run(write_run(tmp_path / "run", [entry]))]))[0]
    assert header[-2:] == ["start", "end"]


@pytest.mark.parametrize("languages", [2, 5, 30])
def test_stays_narrow(tmp_path, languages):
    many = {f"language-{k}": 4.0 for k in range(languages)}
    entry = stage("a long name " * 9, validation_start=losses(9.0) | many, validation_end=many)
    text = stage_table([read_run(write_run(tmp_path / "run", [entry]))])
    assert max(map(len, text.splitlines())) < 150
    for name in many:
        assert f"end {name}"[:16] in text
    blocks = text.split("\n\n")
    assert all(block.startswith("stage") for block in blocks)


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    run = read_run(write_run(tmp_path / "run", [stage("a\x1b[31m\nb")]))
    assert "\x1b" not in stage_table([run])
    assert len(stage_table([run]).splitlines()) == 3
