"""A run that fails ends: all its processes, soon, with the error as the last thing that one reads."""

import os
import pickle
import re
import resource
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.trainer.failing import PLACES
from tests.trainer.processes import SMALL, TORCHRUN, Run, failing, lines, training
from trainer.distributed import Distributed, _portable, init_distributed, locked

SECONDS = 10


def assert_ended(run: Run, directory, word: str, seconds: float = SECONDS) -> None:
    """All processes are gone with an error, the lock is free, and the error is the last thing that stands there."""
    run.wait_for(lambda: "failing in" in run.text or run.process.poll() is not None)
    run.seconds_to_end(seconds)
    assert run.process.wait() != 0
    last = re.sub(r"\s*=+\s*$", "", run.text).strip().splitlines()[-1]  # torchrun's report ends with a line of these
    assert word in last, run.text[-3000:]
    if (directory / "run").is_dir():
        with init_distributed() as distributed, locked(directory / "run", distributed):
            pass


SLOW = pytest.mark.slow
SAMPLES = ("trainer.val_samples=2", "sampling.max_new_tokens=16")
FAILURES = [
    pytest.param(1, "clip", "error", 0, (), marks=SLOW),
    (2, "worker", "value", 1, ()),
    pytest.param(1, "start", "error", 0, (), marks=SLOW),
    pytest.param(1, "worker", "memory", 0, (), marks=SLOW),
    pytest.param(1, "background", "disk", 0, (), marks=SLOW),
    pytest.param(1, "background", "disk", 0, ("trainer.async_checkpoints=false",), marks=SLOW),
    pytest.param(1, "publish", "disk", 0, (), marks=SLOW),
    pytest.param(1, "validation", "value", 0, (), marks=SLOW),
    pytest.param(1, "export", "disk", 0, (), marks=SLOW),
    pytest.param(1, "clip", "thread", 0, (), marks=SLOW),
    pytest.param(1, "clip", "error", 0, ("data.num_workers=4",), marks=SLOW),
    pytest.param(1, "clip", "error", 0, ("data.num_workers=0",), marks=SLOW),
    *(
        pytest.param(2, place, how, rank, (), marks=SLOW)
        for rank in (0, 1)
        for place, how in (
            ("start", "value"), ("rows", "error"), ("worker", "error"), ("loss", "memory"), ("clip", "error"),
            ("clip", "value"), ("validation", "error"), ("background", "disk"),
        )
    ),
    *(pytest.param(2, "samples", "error", rank, SAMPLES, marks=SLOW) for rank in (0, 1)),
    pytest.param(2, "publish", "disk", 0, (), marks=SLOW),
    pytest.param(2, "export", "disk", 0, (), marks=SLOW),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_the_places_exist(place):
    """Most tests that use them are slow."""
    owner, name = PLACES[place]
    assert callable(getattr(owner, name))


@pytest.mark.parametrize(("ranks", "place", "how", "rank", "arguments"), FAILURES)
def test_whatever_is_raised_ends_the_run(tmp_path, ranks, place, how, rank, arguments):
    with failing(tmp_path, ranks, place, how, rank, *arguments) as run:
        assert_ended(run, tmp_path, f"a {how} of the test")


@pytest.mark.slow
def test_torchrun_starts_it_again(tmp_path):
    """Fails at the given place in the first attempt only."""
    script = ROOT / "tests" / "trainer" / "failing.py"
    settings = ["trainer.max_steps=6", "trainer.save_checkpoint_steps=1", "trainer.output_dir=run", *SMALL]
    command = [*TORCHRUN, "--max-restarts=1", script, "clip", "error", "1", *settings]
    with Run(tmp_path, *command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") as run:
        assert run.process.wait(120) == 0, run.text
        assert "resumed from" in run.text
        assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()


def test_a_killed_trainer_leaves_no_worker(tmp_path):
    with training(tmp_path, 1, "data.num_workers=2") as run:
        run.wait_for(lambda: lines(tmp_path / "run") > 2)
        assert len(run.processes()) >= 3
        run.process.kill()
        run.seconds_to_end(5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others(tmp_path, rank):
    with training(tmp_path, 2) as run:
        run.wait_for(lambda: lines(tmp_path / "run") > 2)
        os.kill(run.children()[rank], signal.SIGKILL)
        run.seconds_to_end(15)
        assert run.process.wait() != 0
        assert f"error: rank {rank} died without an error" in run.text


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["rank", "torchrun"])
def test_a_rank_that_hangs_ends_with_the_others(tmp_path, killed):
    """As in a collective of NCCL, which no exception reaches."""
    with failing(tmp_path, 2, "clip", "hang", 0) as run:
        run.wait_for(lambda: "failing in" in run.text)
        os.kill(run.children()[1] if killed == "rank" else run.process.pid, signal.SIGKILL)
        run.seconds_to_end(15)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_leaves_nothing(tmp_path, number):
    command = [sys.executable, ROOT / "train.py", "-m", "optim.lr=1e-4,1e-3", "trainer.max_steps=100000", *SMALL]
    with Run(tmp_path, *command) as run:
        run.wait_for(lambda: any(lines(job.parent) > 2 for job in tmp_path.glob("multirun/*/0/job.json")))
        os.kill(run.process.pid, number)
        run.seconds_to_end(SECONDS)
        assert run.process.wait() == 128 + number
        [job] = tmp_path.glob("multirun/*/0/job.json")
        assert f"stopped by {number.name}" in job.read_text()
        assert list(job.parent.glob("checkpoints/step_*")), "what was trained is saved"
        assert not (job.parent.parent / "1").exists()


@pytest.mark.slow
def test_a_killed_sweep_ends_its_job(tmp_path):
    """Linux tells torchrun, which lets the ranks save."""
    command = [sys.executable, ROOT / "train.py", "-m", "optim.lr=1e-4,1e-3", "trainer.max_steps=100000", *SMALL]
    with Run(tmp_path, *command) as run:
        run.wait_for(lambda: any(lines(job.parent) > 2 for job in tmp_path.glob("multirun/*/0/job.json")))
        run.process.kill()
        run.seconds_to_end(SECONDS)
        assert list(tmp_path.glob("multirun/*/0/checkpoints/step_*")), "what was trained is saved"


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [20, 100, 500])
def test_a_full_disk_is_called_one(tmp_path, kilobytes):
    """A limit on the size of files stands in for the disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))

    settings = ["trainer.max_steps=6", "trainer.save_checkpoint_steps=2", "trainer.output_dir=run", *SMALL]
    command = [sys.executable, ROOT / "train.py", *settings]
    done = subprocess.run(command, cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "the disk is full" in error
    assert done.stderr.strip().endswith(error)


def test_an_error_that_cannot_be_sent_is_sent_as_text():
    class TwoArgumentsError(ValueError):
        def __init__(self, one, two):
            super().__init__(f"{one} {two}")

    class LockedError(OSError):
        def __reduce__(self):
            raise TypeError("cannot pickle")

    for error in (TwoArgumentsError("a", "b"), LockedError("a b"), ValueError("a b"), FileNotFoundError(2, "a b")):
        sent = pickle.loads(pickle.dumps(_portable(error)))
        assert isinstance(sent, OSError if isinstance(error, OSError) else ValueError)
        assert "a b" in str(sent)


def test_a_lock_is_no_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with init_distributed() as distributed:
        assert isinstance(distributed, Distributed)
        with (
            pytest.raises(ValueError, match=r"run/\.lock is a symbolic link to .*precious"),
            locked(tmp_path / "run", distributed),
        ):
            pass
    assert (tmp_path / "precious").read_text() == "precious"
