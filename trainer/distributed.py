"""The ranks of a run and the device of this one."""

import os
import pickle
import platform
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.storage import lock_file, refuse_links
from trainer.ending import SPEAK_SECONDS, Deadline, FirstError, PeerWatch

GIB = 2**30
LOCK = ".lock"
CPUINFO = Path("/proc/cpuinfo")  # of Linux
PATIENCE = timedelta(days=7)  # how long a finished rank waits for the others


@dataclass(frozen=True)
class Distributed:
    """This process among the ranks of torchrun, or alone."""

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None  # all ranks, with the timeout PATIENCE

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float | Tensor, equal: Sequence[Tensor] = ()) -> list[float]:
        """Sums over all ranks, in float64, on the device of the values: those on the host wait for no GPU. Collective.

        Args:
            equal: scalars that all ranks have; they follow the sums, and cost no wait of their own.
        """
        on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in values)
        device = self.device if on_gpu else torch.device("cpu")
        total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
        dist.all_reduce(total)
        return torch.cat([total, *(value.to(device, torch.float64).view(1) for value in equal)]).tolist()

    def wait(self) -> None:
        """Wait for all ranks, up to PATIENCE. Collective."""
        if self.patient is not None:
            dist.barrier(self.patient)

    def gather(self, item: Any) -> list[Any]:
        """The items of all ranks in rank order. Collective."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Call `work` on rank 0; every rank returns its value or raises its error. Collective."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except (ValueError, OSError) as error:
                outcome[1] = _portable(error)
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _portable(error: ValueError | OSError) -> ValueError | OSError:
    """The error, or a plain one with its text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return (ValueError if isinstance(error, ValueError) else OSError)(str(error))
    return error


def device_memory(device: torch.device) -> int:
    """Bytes of a rank's memory: its GPU's, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_name(device: torch.device) -> str:
    """Model of a GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.+)", CPUINFO.read_text()) if CPUINFO.exists() else None
    return found[1] if found else platform.machine()


def ranks_from_environment() -> tuple[int, int]:
    """Rank and number of ranks from torchrun, or 0 and 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_alone(what: str, command: str) -> None:
    """Refuse several ranks.

    Args:
        command: starts `what` on one rank.

    Raises:
        ValueError: torchrun has started more than one.
    """
    if (ranks := ranks_from_environment()[1]) > 1:
        raise ValueError(f"{what} is for one rank, torchrun has started {ranks}: start it with `{command} …`")


@contextmanager
def locked(directory: Path, distributed: Distributed, *written: str) -> Iterator[None]:
    """Lock a directory for this run. Collective.

    Args:
        written: names of the entries that the run will write.

    Raises:
        ValueError: another run holds the lock, or an entry is a symbolic link.
    """
    with ExitStack() as held:

        def lock() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            refuse_links(*(directory / name for name in written))
            held.enter_context(lock_file(directory / LOCK))

        distributed.on_main(lock)
        yield


@contextmanager
def init_distributed() -> Iterator[Distributed]:
    """Join the process group; leave it at the end, so that another run can follow in this process.

    If ranks fail, the first raises its error. The others raise SystemExit SPEAK_SECONDS later: they failed for the same
    reason, or because they lost the first.
    """
    rank, size = ranks_from_environment()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **alone)
    # Created at the start: creating a group has the ordinary timeout.
    patient = dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None
    distributed = Distributed(rank, size, device, patient)
    watch, together = _watch_peers(distributed), False
    try:
        with Deadline.on_error():
            yield distributed
        together = True
    except SystemExit:  # raised by all ranks
        together = True
        raise
    except Exception as error:
        if size > 1:
            _leave_to_first(error, watch)
        raise
    finally:
        if together:
            distributed.wait()  # peers treat a rank that leaves early as dead
            if watch is not None:
                watch.stop()
        if together or size == 1 or device.type == "cpu":  # NCCL would wait for failed ranks
            dist.destroy_process_group()


def _watch_peers(distributed: Distributed) -> PeerWatch | None:
    """Watch the ranks of this machine, if torchrun started them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    node = os.environ["GROUP_RANK"]
    ranks = enumerate(distributed.gather((node, os.getpid())))
    return PeerWatch({rank: process for rank, (other, process) in ranks if other == node and rank != distributed.rank})


def _leave_to_first(error: Exception, watch: PeerWatch | None) -> None:
    """Let only the rank that failed first print its error.

    Raises:
        SystemExit: another rank failed first.
        OSError: another rank died without an error.
    """
    if Deadline.started:  # torchrun sends SIGTERM once a rank has ended, before this one has printed its error
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not FirstError.claim(dist.distributed_c10d._get_default_store()):
        time.sleep(SPEAK_SECONDS)
        raise SystemExit(1) from error
    if watch is not None and isinstance(error, RuntimeError):
        for _ in range(10):  # torchrun takes a moment to notice
            if dead := watch.dead():
                raise OSError(f"rank {dead[0]} died without an error; something killed it") from error
            time.sleep(0.1)
