"""Checkpoints: written under a temporary name, visible only when whole.

A checkpoint is a directory `step_00000500` with what torch.distributed.checkpoint writes and a `checkpoint.json`, which
holds the step, the resolved configuration, the versions and the size of every file.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from diffllm import DiffLLM
from trainer.world import World

MANIFEST = "checkpoint.json"
UNFINISHED = ".unfinished"


@dataclass
class TrainingState:
    """All that a step changes. Data position and learning rate are functions of the step, which the manifest holds."""

    model: DiffLLM
    optimizer: Optimizer
    world: World

    def state_dict(self) -> dict[str, Any]:
        """Sharded tensors and plain values, as dcp takes them; loading into it fills it in place."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "rng": {f"rank_{self.world.rank}": _rng_state(self.world.device)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        rng = state["rng"][f"rank_{self.world.rank}"]
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.world.device)


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def save(directory: Path, step: int, state: TrainingState, manifest: dict[str, Any], keep: int) -> None:
    """Write the checkpoint of a step, then delete older whole ones but the newest `keep`. Collective.

    Raises:
        OSError: it could not be written, as on a full disk; earlier checkpoints are untouched.
    """
    target = directory / f"step_{step:08d}"
    unfinished = _unfinished(target)
    world = state.world
    try:
        world.on_main(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        dcp.save(state.state_dict(), checkpoint_id=unfinished)
        world.on_main(lambda: _publish(unfinished, target, {"step": step, **manifest}))
    except (OSError, CheckpointException) as error:
        if world.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"checkpoint of step {step} could not be written to {directory}: {_reason(error)}. "
            f"Newest whole checkpoint: {find_newest(directory)[0]}. Free space there and start again to resume from it"
        ) from error
    world.on_main(lambda: _prune(directory, keep))


def _publish(unfinished: Path, target: Path, manifest: dict[str, Any]) -> None:
    sizes = {file.name: file.stat().st_size for file in unfinished.iterdir()}
    (unfinished / MANIFEST).write_text(json.dumps({**manifest, "files": sizes}, indent=2))
    _replace(unfinished, target)


def _prune(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` whole checkpoints; what is broken does not count, and stays to be looked at."""
    whole = [path for path in sorted(directory.glob("step_*")) if find_defect(path) is None]
    for old in whole[:-keep]:
        shutil.rmtree(old)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A directory to write in that takes the place of `target` when all is written.

    Raises:
        OSError: it could not be written, as on a full disk; what was there before is untouched.
    """
    unfinished = _unfinished(target)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
        _replace(unfinished, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{target} could not be written: {error}") from error


def _unfinished(target: Path) -> Path:
    return target.with_name(target.name + UNFINISHED)


def _replace(unfinished: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    os.replace(unfinished, target)


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


def load(checkpoint: Path, state: TrainingState) -> dict[str, Any]:
    """Restore everything from a whole checkpoint, written by any number of ranks on any device. Collective.

    Returns:
        Its manifest.

    Raises:
        ValueError: it belongs to a model of another shape, or its files are corrupt.
    """
    values = state.state_dict()
    try:
        saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        check_shapes(checkpoint, saved, values["model"])
        # A rank or a kind of device that the run did not have keeps its own random state.
        rank = f"rank_{state.world.rank}"
        own = values["rng"][rank]
        values["rng"] = {rank: {kind: value for kind, value in own.items() if f"rng.{rank}.{kind}" in saved}}
        dcp.load(values, checkpoint_id=checkpoint)
    except (CheckpointException, EOFError, UnpicklingError) as error:
        raise ValueError(f"{checkpoint}: its files are corrupt ({_reason(error)}); delete it") from error
    values["rng"][rank] = own | values["rng"].get(rank, {})
    state.load_state_dict(values)
    return read_manifest(checkpoint)


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
