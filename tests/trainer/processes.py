"""Real runs in processes of their own, all of which can be found again."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from tests.conftest import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SMALL = [
    "data.max_length=64", "data.train_batch_size=8", "model.hidden_size=32", "model.intermediate_size=64",
    "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.num_key_value_heads=2",
    "trainer.peak_tflops=0.1", "trainer.logger=[]",
]  # fmt: skip


class Run:
    """A command, and every process that comes from it.

    Args:
        directory: to run in; the output goes to `output.txt` there.
    """

    def __init__(self, directory: Path, *command: str | Path, **environment: str):
        self.output, self.mark = directory / "output.txt", f"DIFFLLM_TEST={uuid.uuid4()}"
        variables = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
        variables |= dict([self.mark.split("=")])
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=directory,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        self.process.wait()

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def processes(self) -> list[int]:
        """Ids of all processes of the run that are alive."""
        alive = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    alive.append(int(entry.name))
            except (OSError, ProcessLookupError):
                continue
        return alive

    def children(self) -> list[int]:
        """Ids of the first process's children: of torchrun, its ranks."""
        process = self.process.pid
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]

    def wait_for(self, condition, seconds: float = 120) -> None:
        """Wait for a condition during the run."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def seconds_to_end(self, most: float) -> float:
        """Seconds until no process is left."""
        started = time.monotonic()
        while (taken := time.monotonic() - started) < most:
            self.process.poll()
            if not self.processes():
                return taken
            time.sleep(0.05)
        raise AssertionError(f"{len(self.processes())} processes are left after {most} s:\n{self.text[-3000:]}")


def lines(directory: Path) -> int:
    """Steps that a run has written to its metrics.jsonl."""
    file = directory / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def training(directory: Path, ranks: int, *arguments: str, **environment: str) -> Run:
    """A long run of train.py in `directory`/run, with loader workers."""
    start = TORCHRUN if ranks > 1 else [sys.executable]
    settings = ["trainer.max_steps=100000", "trainer.output_dir=run", *SMALL, *arguments]
    return Run(directory, *start, ROOT / "train.py", *settings, **environment)


def failing(directory: Path, ranks: int, place: str, how: str, rank: int, *arguments: str) -> Run:
    """A run of six steps that fails; see `tests/trainer/failing.py`."""
    start = [*TORCHRUN[:-1], f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]
    settings = ["trainer.max_steps=6", "trainer.save_checkpoint_steps=2", "trainer.output_dir=run", *SMALL, *arguments]
    return Run(directory, *start, ROOT / "tests" / "trainer" / "failing.py", place, how, str(rank), *settings)
