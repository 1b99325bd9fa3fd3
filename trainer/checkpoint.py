"""Checkpoints: written under a temporary name, visible only when whole.

A checkpoint is a directory `step_00000500` with what torch.distributed.checkpoint writes and a `checkpoint.json`, which
holds the step, the resolved configuration, the versions and the size of every file.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diffllm import DiffLLM
from trainer.world import World

MANIFEST = "checkpoint.json"
UNFINISHED = ".unfinished"


@dataclass
class TrainingState:
    """All that a step changes. The data position is the step: batches are functions of it."""

    model: DiffLLM
    optimizer: Optimizer
    lr_schedule: LRScheduler
    world: World

    def state_dict(self) -> dict[str, Any]:
        """Sharded tensors and plain values, as dcp takes them; loading into it fills it in place."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "lr_schedule": self.lr_schedule.state_dict(),
            "rng": {f"rank_{self.world.rank}": _rng_state(self.world.device)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.lr_schedule.load_state_dict(state["lr_schedule"])
        if rng := state["rng"].get(f"rank_{self.world.rank}"):
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], self.world.device)


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def save(directory: Path, step: int, state: TrainingState, manifest: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of a step, then delete all but the newest `keep`. Collective.

    Raises:
        OSError: it could not be written, as on a full disk; earlier checkpoints are untouched.
    """
    target = directory / f"step_{step:08d}"
    unfinished = target.with_name(target.name + UNFINISHED)
    world = state.world
    try:
        _on_main(world, lambda: shutil.rmtree(unfinished, ignore_errors=True))
        dcp.save(state.state_dict(), checkpoint_id=unfinished)
        _on_main(world, lambda: _publish(unfinished, target, {"step": step, **manifest}))
    except (OSError, CheckpointException) as error:
        if world.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        newest = max(map(str, directory.glob("step_*[0-9]")), default="none")
        raise OSError(
            f"checkpoint of step {step} could not be written to {directory}: {_reason(error)}. "
            f"Newest whole checkpoint: {newest}. Free space there and start again to resume from it"
        ) from error
    if world.is_main:
        for old in sorted(directory.glob("step_*[0-9]"))[:-keep]:
            shutil.rmtree(old)
    return target


def _publish(unfinished: Path, target: Path, manifest: dict[str, Any]) -> None:
    sizes = {file.name: file.stat().st_size for file in unfinished.iterdir()}
    (unfinished / MANIFEST).write_text(json.dumps({**manifest, "files": sizes}, indent=2))
    if target.exists():
        shutil.rmtree(target)
    os.replace(unfinished, target)


def _on_main(world: World, write: Callable[[], None]) -> None:
    """Run on rank 0; an OSError there is raised on every rank."""
    outcome: list[OSError | None] = [None]
    if world.is_main:
        try:
            write()
        except OSError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]


def _reason(error: BaseException) -> str:
    """The operating system's words, out of what the ranks reported."""
    if isinstance(error, CheckpointException):
        return "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
    return str(error)


def find_newest(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and what was skipped on the way and why."""
    skipped = []
    for candidate in sorted(directory.glob("step_*"), reverse=True):
        defect = find_defect(candidate)
        if defect is None:
            return candidate, skipped
        skipped.append(f"{candidate}: {defect}")
    return None, skipped


def find_defect(checkpoint: Path) -> str | None:
    """Why a directory is not a whole checkpoint; None if it is one."""
    if not checkpoint.is_dir():
        return "no such checkpoint directory"
    if checkpoint.name.endswith(UNFINISHED):
        return "half-written, the run stopped while saving it"
    try:
        files = read_manifest(checkpoint)["files"]
    except (OSError, json.JSONDecodeError, KeyError):
        return f"not a checkpoint, {MANIFEST} is missing or unreadable"
    for name, size in files.items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            return f"half-written, {name} is missing or cut short"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MANIFEST).read_text())


def load(checkpoint: Path, state: TrainingState) -> int:
    """Restore everything from a whole checkpoint, written by any number of ranks. Collective.

    Returns:
        The number of steps done.

    Raises:
        ValueError: it belongs to a model of another shape.
    """
    values = state.state_dict()
    saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    check_shapes(checkpoint, saved, values["model"])
    if not any(key.startswith(f"rng.rank_{state.world.rank}.") for key in saved):
        values["rng"] = {}
    dcp.load(values, checkpoint_id=checkpoint)
    state.load_state_dict(values)
    return read_manifest(checkpoint)["step"]


def check_shapes(checkpoint: Path, saved: dict[str, Any], model: dict[str, torch.Tensor]) -> None:
    """Compare a checkpoint's tensors with a model's.

    Raises:
        ValueError: names or shapes differ; the first few differences are named.
    """
    theirs = {key.removeprefix("model."): tuple(item.size) for key, item in saved.items() if key.startswith("model.")}
    ours = {key: tuple(tensor.shape) for key, tensor in model.items()}
    differences = [
        f"{key} is {theirs.get(key, 'absent')} there and {ours.get(key, 'absent')} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if differences:
        raise ValueError(
            f"{checkpoint} belongs to a model of another shape: {'; '.join(differences[:3])}"
            f" ({len(differences)} differences). Give the model's own settings, or another trainer.experiment_name"
        )
