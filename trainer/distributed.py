"""The ranks of a run and the device of this one."""

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
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

LOCK = ".lock"
PATIENCE = timedelta(days=7)  # of a rank that is done, for the others


@dataclass(frozen=True)
class Distributed:
    """Where this process stands: as torchrun says, or alone."""

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None  # of all ranks, for waits that may take days

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float | Tensor) -> list[float]:
        """Sums over all ranks, in float64."""
        total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Wait until all ranks have come here, however long one works alone. Collective."""
        if self.patient is not None:
            dist.barrier(self.patient)

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
                outcome[1] = _portable(error)
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _portable(error: ValueError | OSError) -> ValueError | OSError:
    """The error, or its text in a plain one where it cannot be sent to other ranks."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return (ValueError if isinstance(error, ValueError) else OSError)(str(error))
    return error


def ranks_from_environment() -> tuple[int, int]:
    """This rank and the number of ranks: torchrun's, or 0 of 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def locked(directory: Path, distributed: Distributed, *written: str) -> Iterator[None]:
    """Keep a directory to this run. Collective.

    Args:
        written: names in the directory that the run will write.

    Raises:
        ValueError: another run writes there, or one of the names cannot be written, such as a symbolic link.
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

    Of several ranks that fail, the first raises its error. The others leave with SystemExit a little later: they failed
    alike, or because they lost the first.
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
    # Made now: to make it the ranks wait for each other as long as in any other collective.
    patient = dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None
    distributed = Distributed(rank, size, device, patient)
    watch, together = _watch_peers(distributed), False
    try:
        with Deadline.on_error():
            yield distributed
        together = True
    except SystemExit:  # of all ranks alike
        together = True
        raise
    except Exception as error:
        if size > 1:
            _leave_to_first(error, watch)
        raise
    finally:
        if together:
            distributed.wait()  # a rank that leaves early would be taken for dead
            if watch is not None:
                watch.stop()
        if together or device.type == "cpu":  # NCCL would wait for ranks that have failed
            dist.destroy_process_group()


def _watch_peers(distributed: Distributed) -> PeerWatch | None:
    """Watch the ranks of this machine, if torchrun started them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    here = os.environ["GROUP_RANK"]  # of this machine's torchrun
    ranks = enumerate(distributed.gather((here, os.getpid())))
    return PeerWatch({rank: process for rank, (group, process) in ranks if group == here and rank != distributed.rank})


def _leave_to_first(error: Exception, watch: PeerWatch | None) -> None:
    """Leave it to the rank that failed first to speak.

    Raises:
        SystemExit: another rank was first.
        OSError: another rank died without a word.
    """
    if Deadline.started:  # torchrun sends SIGTERM as soon as one rank has ended: the error would not be printed
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not FirstError.claim(dist.distributed_c10d._get_default_store()):
        time.sleep(SPEAK_SECONDS)
        raise SystemExit(1) from error
    if watch is not None and isinstance(error, RuntimeError):
        for _ in range(10):  # torchrun takes a moment to notice
            if dead := watch.dead():
                raise OSError(f"rank {dead[0]} died without an error, as one does that is killed") from error
            time.sleep(0.1)
