"""Machines die: SIGKILL at random moments, and ranks that torchrun starts again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.conftest import ROOT
from tests.launch.test_cli import SMALL
from tests.trainer.runs import losses, metrics, weights

pytestmark = pytest.mark.slow

RUN = [*SMALL, "trainer.max_steps=150", "trainer.save_checkpoint_steps=3", "trainer.logger=[]", "optim.lr=1e-3"]


def lines(directory: Path) -> int:
    file = directory / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def optimizer_state(run: Path, file: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(run / "checkpoints" / "step_00000150", file)
    return torch.load(file)


def assert_same(run: Path, whole: Path, scratch: Path) -> None:
    """Every step once with the same loss; weights and optimizer bitwise equal."""
    assert [line["step"] for line in metrics(run)] == list(range(1, 151))
    assert losses(run) == losses(whole)
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(whole).items())
    ours, theirs = (optimizer_state(path, scratch / f"{path.name}.pt")["optimizer"]["state"] for path in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(moment, theirs[name][kind]) for name in ours for kind, moment in ours[name].items())


def test_ten_kills_at_random_moments_lose_nothing(tmp_path):
    """A checkpoint every third step, so that many of them fall into a save."""
    command = [sys.executable, ROOT / "train.py", *RUN]
    subprocess.run([*command, "trainer.output_dir=whole"], cwd=tmp_path, check=True, capture_output=True)
    rng, killed, saving = random.Random(0), 0, 0
    while killed < 10:
        process = subprocess.Popen([*command, "trainer.output_dir=run"], cwd=tmp_path, stdout=subprocess.DEVNULL)
        target = lines(tmp_path / "run") + rng.randint(1, 12)
        while lines(tmp_path / "run") < target and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        assert process.poll() is None, "the run ended before it was killed ten times"
        process.kill()
        process.wait()
        killed += 1
        saving += any((tmp_path / "run" / "checkpoints").glob("*.unfinished"))
    last = subprocess.run(
        [*command, "trainer.output_dir=run"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "resumed from" in last.stdout
    print(f"{saving} of {killed} kills fell into a save")
    assert_same(tmp_path / "run", tmp_path / "whole", tmp_path)


def test_torchrun_starts_again_after_three_kills(tmp_path):
    environment = os.environ | {"RESTARTS": "3", "RANKS": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [ROOT / "launch" / "local.sh", ROOT / "train.py", *RUN]
    subprocess.run([*command, "trainer.output_dir=whole"], cwd=tmp_path, env=environment, check=True)
    process = subprocess.Popen([*command, "trainer.output_dir=run"], cwd=tmp_path, env=environment)
    for kill in range(3):
        target = lines(tmp_path / "run") + 10
        while lines(tmp_path / "run") < target:
            assert process.poll() is None, f"the run ended after {kill} kills"
            time.sleep(0.01)
        ranks = rank_processes(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[kill % 2], signal.SIGKILL)
        while set(ranks) & set(rank_processes(process.pid)):
            time.sleep(0.01)
    assert process.wait() == 0
    assert_same(tmp_path / "run", tmp_path / "whole", tmp_path)
    assert (
        json.loads((tmp_path / "run" / "checkpoints" / "step_00000150" / "checkpoint.json").read_text())["ranks"] == 2
    )


def rank_processes(agent: int) -> list[int]:
    """torchrun's children."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(child) for child in children if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
