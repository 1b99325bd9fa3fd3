"""Save and load checkpoints. They are written under a temporary name and renamed when whole.

A checkpoint is a directory `step_00000500` with tensors, written by torch.distributed.checkpoint, and a
`checkpoint.json` (trainer/manifest.py) with everything else.
"""

import shutil
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from packaging.version import Version
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from data.errors import differences
from data.storage import UNFINISHED, find_full_disk, first_line, publish, remove, unfinished_of
from data.terminal import printable
from diffllm import DiffLLM
from trainer.dcp import DigestingWriter, SafeReader, TensorLoadPlanner
from trainer.distributed import Distributed
from trainer.manifest import candidates, find_damage, find_defect, path_of, read_manifest, write_manifest

# Before torch 2.13 a stager empties itself after a copy, and the next one fails with KeyError: <class 'type'>.
STAGER_IS_SPENT = Version(torch.__version__) < Version("2.13")
LAST_SAVE_SECONDS = 4  # how long a failing run waits for an unfinished save


@dataclass
class TrainingState:
    """State that a step changes. The rest follows from the step number, and the position of a stream, in the manifest.

    Frozen weights are left out: the run reads them from their source. So are the optimizer's hyperparameters, which
    the configuration holds.
    """

    model: DiffLLM
    optimizer: Optimizer
    distributed: Distributed

    def __post_init__(self) -> None:
        """Create zero moments: torch would create them at the first read, by a step that counts."""
        get_optimizer_state_dict(self.model, self.optimizer)
        for moments in self.optimizer.state.values():
            if "step" in moments:  # not beside Muon's momentum
                moments["step"].zero_()

    def state_dict(self) -> dict[str, Any]:
        """Sharded tensors for dcp, which loads into them in place."""
        model, optimizer = get_state_dict(
            self.model, self.optimizer, options=StateDictOptions(ignore_frozen_params=True)
        )
        return {
            "model": model,
            "optimizer": {"state": optimizer["state"]},
            "rng": {f"rank_{self.distributed.rank}": _rng_state(self.distributed.device)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        current = get_optimizer_state_dict(self.model, self.optimizer)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict={**current, **state["optimizer"]},
            options=StateDictOptions(strict=False),
        )
        rng = state["rng"][f"rank_{self.distributed.rank}"]
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.distributed.device)


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


@contextmanager
def naming_the_copy() -> Iterator[None]:
    """Let an error of memory name the copy in the host's memory.

    Raises:
        MemoryError: the block ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:  # of torch
        if "memory" not in str(error):
            raise
        raise MemoryError(
            f"no memory of the host for the copy that is written in the background ({first_line(error)}): set "
            "trainer.async_checkpoints=false"
        ) from error


class Checkpoints:
    """Saves the checkpoints of a run, one at a time.

    If `asynchronous`, a copy of the state is written in the background while training continues; call `wait_for_copy`
    before the state changes. A checkpoint gets its name when all ranks have written their files. Then all whole ones
    but the newest `keep` are deleted.

    Args:
        broken: damaged checkpoints. They do not count toward `keep` and are not deleted, unless they are unfinished.
        keep_best: do not delete the checkpoint of the `best_step` in the newest manifest.
    """

    def __init__(
        self,
        directory: Path,
        state: TrainingState,
        keep: int,
        asynchronous: bool,
        broken: Iterable[Path] = (),
        keep_best: bool = False,
    ):
        self.directory, self.state, self.keep, self.asynchronous = directory, state, keep, asynchronous
        self.keep_best = keep_best
        self._broken = set(broken)
        # A separate group: saves run beside the collectives of training.
        self._group = dist.new_group(backend="gloo")
        self._stager = self._new_stager()
        self._copied: Future | None = None
        self._pending: Future | None = None
        self._target, self._manifest = directory, {}  # of the pending save
        self._writer = DigestingWriter(directory)

    def save(self, step: int, manifest: dict[str, Any]) -> None:
        """Start to write the checkpoint of a step. Collective.

        Raises:
            OSError: this or the previous one could not be written, as on a full disk. Whole ones are kept.
        """
        self.wait()
        self._target, self._manifest = path_of(self.directory, step), {"step": step, **manifest}
        self.state.distributed.on_main(self._discard)
        state = self.state.state_dict()
        self._writer = DigestingWriter(unfinished_of(self._target), staged=self.asynchronous)
        where = {"storage_writer": self._writer, "process_group": self._group}
        if self.asynchronous:
            if self.state.distributed.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # the copy runs in another stream
            if STAGER_IS_SPENT:
                self._stager.close()
                self._stager = self._new_stager()
            saving = dcp.async_save(state, async_stager=self._stager, **where)
            self._copied, self._pending = saving.staging_completion, saving.upload_completion
            return
        self._pending = Future()
        try:
            self._pending.set_result(dcp.save(state, **where))
        except (OSError, CheckpointException) as error:
            self._pending.set_exception(error)
        self.wait()

    def wait_for_copy(self) -> None:
        """Wait until the state may change.

        Raises:
            MemoryError: the host has no memory for the copy.
        """
        copied, self._copied = self._copied, None
        if copied is not None:
            with naming_the_copy():
                copied.result()

    def poll(self) -> bool:
        """Publish the pending checkpoint if it is written. Only rank 0 does, after all ranks have written their files.

        Returns:
            Whether it failed. `wait` then tries again to publish it, or raises the error.
        """
        if self._pending is None or not self._pending.done():
            return False
        if self._pending.exception() is not None:
            return True
        if self.state.distributed.is_main:
            try:
                self._publish()
            except OSError:
                return True
        return False

    def wait(self) -> None:
        """Wait until the pending checkpoint is published. Collective.

        Raises:
            OSError: it could not be written.
            MemoryError: see `wait_for_copy`.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            with naming_the_copy():
                pending.result()
            self.state.distributed.on_main(self._publish)
        except (OSError, CheckpointException) as error:
            if self.state.distributed.is_main:
                self._discard()
            advice = "Free space" if find_full_disk(error) else "Remove the cause"
            raise OSError(
                f"{self._target} could not be written: {_reason(error)}. Newest whole checkpoint: "
                f"{next(iter(self._whole()), 'none')}. {advice} and start again"
            ) from error

    def close(self) -> None:
        """Wait briefly for the pending save, without the other ranks, which may have failed."""
        if self._pending is None:
            self._stager.close()
            return
        with suppress(TimeoutError):
            self._pending.exception(LAST_SAVE_SECONDS)
            self.poll()
            self._stager.close()

    def best_of(self, step: int) -> Path | None:
        """The checkpoint of the step with the best validation, 0 if there is none, or None if it is not kept."""
        return path_of(self.directory, step) if self.keep_best and step else None

    def _new_stager(self) -> DefaultStager:
        cuda = self.state.distributed.device.type == "cuda"
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=cuda
            )
        )

    def _whole(self) -> list[Path]:
        """Whole checkpoints, the newest first."""
        return [path for path in candidates(self.directory) if path not in self._broken and find_defect(path) is None]

    def _discard(self) -> None:
        remove(unfinished_of(self._target))

    def _publish(self) -> None:
        """Give the written checkpoint its name, unless `poll` already has, and delete old ones."""
        unfinished = unfinished_of(self._target)
        if not unfinished.exists():
            return
        write_manifest(unfinished, self._manifest, self._writer.digests)
        publish(unfinished, self._target)
        self._broken.discard(self._target)
        best = self.best_of(self._manifest.get("best_step", 0))
        old_ones = [path for path in self._whole()[self.keep :] if path != best]
        for old in (*old_ones, *self.directory.glob(f"*{UNFINISHED}")):
            try:
                shutil.rmtree(old)
            except OSError as error:
                print(printable(f"{old} could not be deleted: {error}"), flush=True)


def _reason(error: BaseException) -> str:
    """The operating system's message in the errors of the ranks."""
    if full := find_full_disk(error):
        return full
    if isinstance(error, CheckpointException):
        return "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
    return str(error)


def find_fault(checkpoint: Path, distributed: Distributed) -> str | None:
    """Return why a checkpoint is not whole, or None. Collective: each rank checks the digests of its share of files."""
    defect = distributed.on_main(lambda: find_defect(checkpoint))
    if defect is not None:
        return defect
    damages = distributed.gather(find_damage(checkpoint, distributed.rank, distributed.size))
    return next(filter(None, damages), None)


def find_newest(directory: Path, distributed: Distributed) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint of a run, and the reason for each skipped one. Collective."""
    skipped = {path: find_defect(path) for path in sorted(directory.glob(f"*{UNFINISHED}"))}
    for candidate in distributed.on_main(lambda: candidates(directory)):
        defect = find_fault(candidate, distributed)
        if defect is None:
            return candidate, skipped
        skipped[candidate] = defect
    return None, skipped


def load(checkpoint: Path, state: TrainingState) -> dict[str, Any]:
    """Restore the state from a whole checkpoint, written by any number of ranks on any device. Collective.

    Returns:
        Its manifest.

    Raises:
        ValueError: its model has another shape, or its files are corrupt.
    """
    values = state.state_dict()
    with _refusing_corrupt(checkpoint):
        saved = SafeReader(checkpoint).read_metadata().state_dict_metadata
        check_shapes(checkpoint, saved, values["model"])
        # A rank or device type that is new to the run keeps its own random state.
        rank = f"rank_{state.distributed.rank}"
        own = values["rng"][rank]
        values["rng"] = {rank: {kind: value for kind, value in own.items() if f"rng.{rank}.{kind}" in saved}}
        dcp.load(values, storage_reader=SafeReader(checkpoint), planner=TensorLoadPlanner())
    values["rng"][rank] = own | values["rng"].get(rank, {})
    state.load_state_dict(values)
    return read_manifest(checkpoint)


def load_weights(checkpoint: Path, weights: dict[str, torch.Tensor]) -> None:
    """Read weights of a whole checkpoint into tensors by name, in one process without ranks.

    Raises:
        ValueError: its files are corrupt.
    """
    with _refusing_corrupt(checkpoint), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended
        dcp.load({"model": weights}, storage_reader=SafeReader(checkpoint), planner=TensorLoadPlanner(), no_dist=True)


@contextmanager
def _refusing_corrupt(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, EOFError, UnpicklingError) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        if any(isinstance(cause, OSError | MemoryError | torch.OutOfMemoryError) for cause in causes):
            raise OSError(
                f"{checkpoint} could not be read ({_reason(error)}); start again to resume from it"
            ) from error
        raise ValueError(f"{checkpoint}: its files are corrupt ({_reason(error)}); delete it") from error


def check_shapes(checkpoint: Path, saved: dict[str, Any], model: dict[str, torch.Tensor]) -> None:
    """Compare a checkpoint's tensors with a model's.

    Raises:
        ValueError: names or shapes differ; the message gives the first three differences.
    """
    theirs = {key.removeprefix("model."): tuple(item.size) for key, item in saved.items() if key.startswith("model.")}
    ours = {key: tuple(tensor.shape) for key, tensor in model.items()}
    if changed := differences(theirs, ours):
        raise ValueError(
            f"{checkpoint} belongs to a model of another shape: {'; '.join(changed[:3])}"
            f" ({len(changed)} differences). Give the model's own settings, or another trainer.experiment_name"
        )
