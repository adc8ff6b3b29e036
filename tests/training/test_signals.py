"""A signal, whenever it comes, stops a run so that it can go on."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from aquila_jax.training import Interrupted, loop, train

from .synthetic import StopAt, assert_equal, final_params, losses, tiny_run


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_same_end_as_one_left_alone(tmp_path, signum, capfd):
    whole = tiny_run(tmp_path / "whole")
    train(whole)
    stopped = tiny_run(tmp_path / "stopped", data=StopAt(3, signum))
    with pytest.raises(Interrupted, match="saved at step 4 of 6; run the same command again"):
        train(stopped)
    assert "stopping after this step" in capfd.readouterr().err
    resumed = tiny_run(tmp_path / "stopped")
    train(resumed)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert_equal(final_params(resumed), final_params(whole))


def test_a_signal_during_the_last_step_stops_what_would_come_next(tmp_path):
    run = tiny_run(tmp_path, data=StopAt(5, signal.SIGTERM))
    with pytest.raises(Interrupted, match="saved at step 6 of 6") as stop:
        train(run)
    assert stop.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(tiny_run(tmp_path)).current.steps == 6


def test_a_signal_during_the_first_validation_stops_before_the_first_step(tmp_path, monkeypatch):
    real = loop.validation_losses

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(loop, "validation_losses", interrupted)
    with pytest.raises(Interrupted, match="saved at step 0 of 6"):
        train(tiny_run(tmp_path))
    monkeypatch.undo()
    assert train(tiny_run(tmp_path)).current.steps == 6


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        ledger = pool.submit(train, tiny_run(tmp_path)).result()
    assert ledger.current.steps == 6
