"""The scripts of tpu_setup/, against programs that note how they are called and fail on demand."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_setup"
PLACE = ("--name", "pod", "--zone", "us-east5-a")
KIND = ("--type", "v5p-256", "--version", "v2-alpha-tpuv5")
TRAIN = ("aquila", "train", "--gin.MODEL_DIR='/mnt/my run'")

# Notes its arguments. Answers what lies in files named for the question, one line for each time
# it is asked, the last for ever; fails where a pattern in `fail` is in its arguments, as often as
# the number before it says.
FAKE = r"""#!/usr/bin/env bash
cd "$FAKE_DIR"
line="$(basename "$0") $*"
(flock 9; printf '%s\n' "$line" >> calls) 9>>lock
for kind in "queued-resources describe" "tpu-vm describe"; do
  if [[ $line == *"$kind"* ]]; then
    file="${kind// /_}"
    [[ -s $file ]] || exit 1
    head -n 1 "$file"
    (( $(wc -l < "$file") < 2 )) || sed -i 1d "$file"
    exit 0
  fi
done
if [[ -s fail ]]; then
  read -r times pattern message < fail
  if ((times > 0)) && [[ $line == *"$pattern"* ]]; then
    printf '%s %s %s\n' "$((times - 1))" "$pattern" "$message" > fail
    echo "ERROR: (gcloud) $message" >&2
    exit 1
  fi
fi
exit 0
"""


class Cloud:
    """What the scripts see of the world."""

    def __init__(self, directory):
        self.directory = directory
        (directory / "bin").mkdir()
        for name in ("gcloud", "xpk", "kubectl", "sbatch", "scancel"):
            (directory / "bin" / name).write_text(FAKE)
            (directory / "bin" / name).chmod(0o755)

    def says(self, kind, *answers):
        (self.directory / kind.replace(" ", "_")).write_text("".join(f"{a}\n" for a in answers))

    def fails(self, times, pattern, message):
        (self.directory / "fail").write_text(f"{times} {pattern} {message}\n")

    def run(self, script, *arguments, stdin=""):
        environment = {
            **os.environ,
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "FAKE_DIR": str(self.directory),
            "TMPDIR": str(self.directory),
            "POLL_SECONDS": "0",
        }
        return subprocess.run(
            [str(SCRIPTS / script), *arguments],
            env=environment, input=stdin, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    @property
    def calls(self):
        path = self.directory / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def made(self, *words):
        return [call for call in self.calls if all(word in call for word in words)]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


DRY = [
    ("create.sh", [*PLACE, *KIND, "--spot", "--slices", "2"], "queued-resources create pod"),
    ("install.sh", PLACE, "make .venv/installed"),
    ("run.sh", [*PLACE, "--", *TRAIN], "supervise.sh"),
    ("logs.sh", PLACE, "tail"),
    ("stop.sh", PLACE, "pkill"),
    ("delete.sh", PLACE, "queued-resources delete pod"),
    ("resume.sh", [*PLACE, *KIND, "--", *TRAIN], "queued-resources create pod"),
    (
        "gke.sh",
        ["create", "--cluster", "c", "--image", "i", *PLACE, *KIND, "--", *TRAIN],
        "xpk workload create",
    ),
    ("gke.sh", ["logs", "--cluster", "c", *PLACE], "kubectl logs"),
    ("gke.sh", ["delete", "--cluster", "c", *PLACE], "xpk workload delete"),
    ("slurm.sh", ["submit", *PLACE, "--nodes", "2", "--gpus", "4", "--", *TRAIN], "sbatch"),
    ("slurm.sh", ["delete", *PLACE], "scancel"),
]


@pytest.mark.parametrize(("script", "arguments", "words"), DRY)
def test_a_dry_run_prints_whole_commands_and_calls_nothing(cloud, script, arguments, words):
    with_flag = list(arguments)
    with_flag.insert(with_flag.index("--") if "--" in with_flag else len(with_flag), "--dry-run")
    done = cloud.run(script, *with_flag)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout.replace("\\ ", " ")
    assert cloud.calls == []
    # Every printed line is one that a shell reads as it was meant.
    for line in done.stdout.splitlines():
        subprocess.run(["bash", "-n", "-c", line], check=True, timeout=20)


def test_a_dry_run_prints_what_is_then_called(cloud):
    arguments = [*PLACE, *KIND, "--reserved", "--slices", "3", "--network", "n", "--project", "p"]
    printed = cloud.run("create.sh", *arguments, "--dry-run").stdout.strip()
    cloud.says("queued-resources describe", "ACTIVE")
    assert cloud.run("create.sh", *arguments).returncode == 0
    assert cloud.calls[0] == printed
    assert printed == (
        "gcloud compute tpus queued-resources create pod --zone=us-east5-a --project=p "
        "--accelerator-type=v5p-256 --runtime-version=v2-alpha-tpuv5 --node-count=3 "
        "--node-prefix=pod --reserved --network=n"
    )


def test_create_waits_until_the_slices_are_there(cloud):
    states = ("WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    cloud.says("queued-resources describe", *states)
    done = cloud.run("create.sh", *PLACE, *KIND)
    assert done.returncode == 0
    assert len(cloud.made("describe")) == 4
    assert done.stderr.count("WAITING_FOR_RESOURCES") == 1


def test_quota_is_said_and_nothing_waited_for(cloud):
    cloud.fails(1, "create", "Quota exceeded for TPUV5P")
    done = cloud.run("create.sh", *PLACE, *KIND)
    assert done.returncode == 1
    assert "Quota exceeded" in done.stderr
    assert "another --zone or --spot" in done.stderr
    assert not cloud.made("describe")


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_request_that_ends_badly_is_named(cloud, state):
    cloud.says("queued-resources describe", "PROVISIONING", state)
    done = cloud.run("create.sh", *PLACE, *KIND)
    assert done.returncode == 1
    assert f"error: pod is {state}: tpu_setup/delete.sh" in done.stderr


def test_install_reaches_every_worker_of_every_slice(cloud):
    assert cloud.run("install.sh", *PLACE, "--slices", "2").returncode == 0
    for node in ("pod-0", "pod-1"):
        assert len(cloud.made("scp", f"{node}:", "--worker=all")) == 1
        assert len(cloud.made("ssh", node, "make .venv/installed", "--worker=all")) == 1
    assert (cloud.directory / "aquila_jax-pod.tar.gz").stat().st_size > 1000


def test_one_worker_that_cannot_be_reached_is_tried_again(cloud):
    cloud.fails(1, "pod-1", "connection to worker 3 timed out")
    done = cloud.run("install.sh", *PLACE, "--slices", "2")
    assert done.returncode == 0
    assert "not all workers of pod-1 could be reached" in done.stderr
    assert "try 1 of 3 failed" in done.stderr


def test_one_worker_that_stays_away_is_an_error(cloud):
    cloud.fails(99, "ssh", "connection timed out")
    done = cloud.run("install.sh", *PLACE)
    assert done.returncode == 1
    assert "could not install on every worker of pod" in done.stderr


def test_run_starts_the_same_words_on_all_slices(cloud):
    assert cloud.run("run.sh", *PLACE, "--slices", "2", "--", *TRAIN).returncode == 0
    starts = [call.replace("pod-1", "pod-0") for call in cloud.made("supervise.sh")]
    assert len(starts) == 2
    assert starts[0] == starts[1]
    # Quoted for the shell there: the quotes and the space arrive as they are.
    assert r"aquila train --gin.MODEL_DIR=\'/mnt/my\ run\'" in starts[0]


def test_delete_asks_first(cloud):
    for answer in ("", "n\n", "no\n"):
        done = cloud.run("delete.sh", *PLACE, stdin=answer)
        assert done.returncode == 1
        assert "nothing was deleted" in done.stderr
    assert cloud.calls == []
    assert cloud.run("delete.sh", *PLACE, stdin="y\n").returncode == 0
    assert cloud.run("delete.sh", *PLACE, "--yes").returncode == 0
    assert len(cloud.made("queued-resources delete pod", "--force", "--quiet")) == 2


RESUME = ("resume.sh", *PLACE, *KIND, "--spot")


def test_resume_starts_what_is_there(cloud):
    cloud.says("queued-resources describe", "ACTIVE")
    cloud.says("tpu-vm describe", "READY")
    assert cloud.run(*RESUME, "--", *TRAIN).returncode == 0
    assert cloud.made("supervise.sh")
    assert not cloud.made("delete")
    assert not cloud.made("create")


@pytest.mark.parametrize(
    ("resource", "slices"), [("SUSPENDED", []), ("ACTIVE", ["PREEMPTED"]), ("FAILED", [])]
)
def test_resume_recreates_what_was_preempted(cloud, resource, slices):
    cloud.says("queued-resources describe", resource, "ACTIVE")
    if slices:
        cloud.says("tpu-vm describe", *slices)
    done = cloud.run(*RESUME, "--yes", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    order = ("queued-resources delete", "queued-resources create", "scp", "supervise.sh")
    numbers = [next(i for i, c in enumerate(cloud.calls) if words in c) for words in order]
    assert numbers == sorted(numbers)
    assert cloud.made("create", "--spot")


def test_resume_asks_before_it_deletes(cloud):
    cloud.says("queued-resources describe", "SUSPENDED")
    done = cloud.run(*RESUME, "--", *TRAIN)
    assert done.returncode == 1
    assert "nothing was deleted" in done.stderr
    assert not cloud.made("delete")
    assert not cloud.made("create")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("create.sh", PLACE, "--type is missing"),
        ("create.sh", [*PLACE, *KIND, "--spot", "--reserved"], "exclude each other"),
        ("create.sh", [*PLACE, *KIND, "--slices", "two"], "--slices must be a whole number"),
        ("run.sh", PLACE, "no command"),
        ("delete.sh", ["--name", "pod; rm", "--zone", "z"], "--name must be lower-case"),
        ("logs.sh", [*PLACE, "--tail"], "unknown flag --tail"),
        ("logs.sh", ["--name"], "--name needs a value"),
        ("gke.sh", ["create", *PLACE], "--cluster is missing"),
        ("slurm.sh", ["start", *PLACE], "say submit, logs or delete"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_called(cloud, script, arguments, message):
    done = cloud.run(script, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert cloud.calls == []


def test_no_script_touches_credentials():
    for script in SCRIPTS.glob("*.sh"):
        text = script.read_text()
        for word in ("print-access-token", "auth ", "TOKEN", "KEY", "SECRET", "set -x"):
            assert word not in text, (script, word)


def _supervise(directory, program, **environ):
    (directory / "command").write_text(f"#!/usr/bin/env bash\n{program}\n")
    (directory / "command").chmod(0o755)
    environment = {
        **os.environ,
        "SUPERVISE_LOCK": str(directory / "lock"),
        "WAIT_SECONDS": "0",
        **environ,
    }
    return subprocess.Popen(
        [SCRIPTS / "supervise.sh", directory / "command"], env=environment, cwd=directory,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "times", "end"),
    [
        ("75 143 137 0", 4, 0),
        ("75 2 0", 2, 2),
        ("1 1 0", 2, 1),
        ("1 75 1 75 0", 5, 0),
    ],
)
def test_supervise_starts_again_by_the_exit_code(tmp_path, codes, times, end):
    (tmp_path / "codes").write_text(codes.replace(" ", "\n") + "\n")
    program = 'echo x >> times; code=$(head -n 1 codes); sed -i 1d codes; exit "$code"'
    assert _supervise(tmp_path, program).wait(60) == end
    assert (tmp_path / "times").read_text() == "x\n" * times


def test_supervise_passes_a_signal_on_and_waits_for_the_save(tmp_path):
    program = "trap 'sleep 0.5; echo saved > saved; exit 143' TERM; touch up; sleep 60 & wait"
    with _supervise(tmp_path, program) as supervisor:
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        second = _supervise(tmp_path, "touch second")
        assert second.wait(20) == 0
        assert not (tmp_path / "second").exists()
        # `_supervise` has rewritten the command, which bash may read on from: not after `wait`.
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(20) == 143
    assert (tmp_path / "saved").read_text() == "saved\n"
