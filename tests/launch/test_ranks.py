"""launch/local.sh takes as many GPUs as divide the batch."""

import os
import subprocess
import sys

import pytest

from launch.ranks import most_ranks
from tests.conftest import ROOT
from trainer.config import Config


@pytest.mark.parametrize(
    ("devices", "settings", "ranks"),
    [
        (6, {}, 6),  # no batch size is given
        (6, {"train_batch_size": 64}, 4),
        (6, {"train_batch_size": 12}, 6),
        (8, {"train_batch_size": 12, "gradient_accumulation_steps": 3}, 4),
        (4, {"train_batch_size": 10, "micro_batch_size_per_gpu": 4}, 4),  # none: the run says why
        (5, {"train_batch_size": 7}, 1),
    ],
)
def test_ranks_divide_the_batch(devices, settings, ranks):
    config = Config()
    vars(config.data).update(settings)
    assert most_ranks(devices, config) == ranks


def test_copies_of_the_model_divide_the_ranks():
    config = Config()
    config.trainer.replicate = 4
    assert most_ranks(6, config) == 4


@pytest.fixture
def started(tmp_path):
    """The number of ranks that local.sh starts on a machine with some GPUs."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
    "-c import torch"*) echo "$GPUS" ;;
    "-m launch.ranks"*) exec {sys.executable} "$@" ;;
    *) printf "%s\\n" "$@" ;;
esac
"""
    )
    python.chmod(0o755)

    def run(gpus: int, *arguments: str, **environment: str) -> str:
        environment = os.environ | {"PYTHON": str(python), "GPUS": str(gpus), "PYTHONPATH": str(ROOT)} | environment
        command = [str(ROOT / "launch" / "local.sh"), *arguments]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        return next(line for line in output.splitlines() if line.startswith("--nproc_per_node=")).partition("=")[2]

    return run


@pytest.mark.slow
def test_local_asks_for_training_on_several_gpus_only(started):
    batch = "data.train_batch_size=64"
    assert started(6, "train.py", batch, "model.mask_token=<|mask|>") == "4"
    assert started(6, "evaluate.py", batch) == "6"
    assert started(1, "train.py", batch) == "1"
    assert started(0, "train.py", batch) == "1"
    assert started(6, "train.py", batch, RANKS="3") == "3"
