"""Real processes, killed without warning: what is left is what no kill would have left."""

import random
import re
import signal

import pytest

from .chaos import STAGES, differences, read_rows, run_killed, run_undisturbed, working
from .worker import STEPS, write_data


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chaos") / "undisturbed"
    directory.mkdir()
    write_data(directory)
    run_undisturbed(directory)
    return directory


@pytest.mark.parametrize(
    ("kills", "least"),
    [(3, {}), pytest.param(9, {"saving": 3, "growing": 1}, marks=pytest.mark.slow)],
    ids=str,
)
def test_killed_at_random_moments_all_stages_end_bit_for_bit_as_if_never_killed(
    undisturbed, kills, least
):
    """`kills` times in every stage; of nine in each, so many `least` meet a save and a growth."""
    directory = undisturbed.with_name(f"killed_{kills}")
    directory.mkdir()
    write_data(directory)
    toll = run_killed(directory, kills, random.Random(0))
    assert toll.by_stage == dict.fromkeys(STAGES, kills)
    assert all(toll.killed[doing] >= number for doing, number in least.items())
    assert differences(directory, undisturbed) == []
    assert "damaged" not in toll.said
    # Growth was done once for good, then resumed from.
    assert len(re.findall("grown by", toll.said)) >= 2


def test_sigterm_saves_the_step_under_way_and_nothing_is_repeated(undisturbed):
    directory = undisturbed.with_name("stopped")
    directory.mkdir()
    write_data(directory)
    rng = random.Random(1)
    stopped = 0
    for wanted in (rng.randint(1, 10), rng.randint(11, 25), rng.randint(26, STEPS - 5)):
        with working(directory, "dense") as worker:
            worker.until(lambda worker=worker, wanted=wanted: worker.rows() >= wanted)
            made = worker.rows()
            worker.process.send_signal(signal.SIGTERM)
            assert worker.end() == 128 + signal.SIGTERM
            if stopped:
                assert f"resumed from step {stopped} in" in worker.said
            stopped = worker.rows()
            assert made <= stopped
            assert (worker.model_dir / "checkpoints" / str(stopped)).is_dir()
    with working(directory, "dense") as worker:
        assert worker.end() == 0
    rows, expected = (read_rows(parent / "dense") for parent in (directory, undisturbed))
    assert [(row["step"], row["loss"]) for row in rows] == [
        (row["step"], row["loss"]) for row in expected
    ]
    assert rows[-1]["step"] == STEPS


def test_a_second_signal_leaves_at_once_also_from_a_compilation(tmp_path):
    write_data(tmp_path)
    # Without compiled programs on disk, the first validation waits for seconds.
    with working(tmp_path, "dense", JAX_ENABLE_COMPILATION_CACHE="false") as worker:
        worker.until(lambda: "from scratch" in worker.said)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.until(lambda: "stopping after this step" in worker.said)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.end() == 128 + signal.SIGTERM
        assert worker.rows() == 0
        # The first signal alone would have saved this.
        assert not (worker.model_dir / "checkpoints" / "0").exists()
