"""The ranks of a run and the device of this one."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Where this process stands: as torchrun says, or alone."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float | Tensor) -> list[float]:
        """Sums over all ranks, in float64."""
        total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, item: Any) -> list[Any]:
        """One item of every rank, in their order. Collective."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Do something on rank 0; what it returns or raises, every rank returns or raises. Collective."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except (ValueError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def ranks_from_environment() -> tuple[int, int]:
    """This rank and the number of ranks: torchrun's, or 0 of 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def locked(directory: Path, world: World) -> Iterator[None]:
    """Keep a directory to this run. Collective.

    Raises:
        ValueError: another run writes there.
    """
    with ExitStack() as held:

        def lock() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((directory / ".lock").open("w"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system gives it back when the process ends
            except (BlockingIOError, PermissionError) as error:
                raise ValueError(f"another run writes to {directory}: wait for it, or name another") from error

        world.on_main(lock)
        yield


@contextmanager
def open_world() -> Iterator[World]:
    """Join the process group; leave it at the end, so that another run can follow in this process."""
    rank, size = ranks_from_environment()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **alone)
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()
