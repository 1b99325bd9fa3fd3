"""Cost of a save for the trainer: `python -m tests.benchmarks.async_checkpoint [DIRECTORY]`.

Saves the state of a model of some hundred MB several times, blocking and in the background, with a forward and backward
pass after each as in training. Prints the medians of 5 of the time in which the trainer stands still.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from diffllm import ModelConfig
from trainer.build import build_model, build_optimizer
from trainer.checkpoint import Checkpoints, TrainingState
from trainer.config import Config
from trainer.distributed import Distributed, init_distributed
from trainer.parallel import shard

SHAPE = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 8, "num_attention_heads": 12}


def stall(checkpoints: Checkpoints, step: int, state: TrainingState) -> float:
    """Seconds in which a save keeps the trainer waiting."""
    manifest = {"versions": {"diffllm": "0"}, "config": {}, "skipped_steps": 0}
    started = time.perf_counter()
    checkpoints.save(step, manifest)
    stood = time.perf_counter() - started
    x = torch.randint(1000, (8, 256))
    masked = torch.rand(x.shape) < 0.5
    state.model(x, x, masked, masked.float()).loss.backward()
    started = time.perf_counter()
    checkpoints.wait_for_copy()
    stood += time.perf_counter() - started
    state.optimizer.step()
    checkpoints.wait()  # the next save comes much later
    return stood


def measure(directory: Path, distributed: Distributed) -> tuple[float, float, float]:
    """Medians of the stalls, blocking and in the background, and the size of a checkpoint in bytes."""
    config = Config(model=ModelConfig(**SHAPE, num_key_value_heads=12))
    model, _ = build_model(config.model)
    shard(model, distributed, config)
    state = TrainingState(model, build_optimizer(model, config.optim), distributed)
    medians = []
    for asynchronous in (False, True):
        checkpoints = Checkpoints(directory / f"{asynchronous}", state, keep=1, asynchronous=asynchronous)
        stalls = [stall(checkpoints, step, state) for step in range(6)]
        checkpoints.close()
        medians.append(statistics.median(stalls[1:]))  # the first allocates
    size = sum(file.stat().st_size for file in (directory / "True").rglob("*.distcp"))
    return *medians, size


def main() -> None:
    with (
        tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as directory,
        init_distributed() as distributed,
    ):
        blocking, background, size = measure(Path(directory), distributed)
    print(
        f"checkpoint of {size / 2**20:,.0f} MiB: the trainer stands still {blocking:.2f} s for a blocking save, "
        f"{background:.3f} s for one in the background, {background / blocking:.1%} of it"
    )


if __name__ == "__main__":
    main()
