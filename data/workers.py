"""Prepare batches ahead of time in worker processes, which end with their rank."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]

PREFETCH = 4  # items that each worker prepares ahead of time


def to_numpy(micro_batches: list[Batch]) -> list[dict[str, np.ndarray]]:
    """Convert to arrays, which pass between processes four times faster than tensors of this size."""
    return [{name: tensor.numpy() for name, tensor in batch.items()} for batch in micro_batches]


def to_device_ready(micro_batches: list[dict[str, np.ndarray]]) -> list[Batch]:
    """Convert back to tensors, in pinned memory if there is a GPU: a DataLoader pins tensors only, not arrays."""
    tensors = [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in micro_batches]
    if not torch.cuda.is_available():
        return tensors
    return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in tensors]


def from_workers(
    dataset: Dataset, workers: int, steps: range | None = None, pack: Callable[[Any], Any] = to_numpy
) -> Iterator[Any]:
    """Yield the items of a dataset, prepared ahead of time in worker processes, or in this process for 0 workers.

    The workers are killed when the iteration is closed or fails. Otherwise a traceback could keep the iterator alive to
    the end of the process, which would wait for workers that wait for the process.

    Args:
        steps: indices of the items of a map-style dataset, in order.
        pack: applied to each item in the worker.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=pack,
        worker_init_fn=_follow_rank,
    )
    iterator = iter(loader)
    try:
        yield from iterator
    except BaseException:
        if workers:
            _kill_workers(iterator)
        raise


def _follow_rank(worker: int) -> None:
    """Ignore the signals that a cluster sends to all processes, and end with the rank.

    A rank that stops needs batches until its step ends. A worker does not notice that its rank was killed: it waits for
    room in a pipe whose other end it holds open itself.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="rank").start()


def _kill_workers(iterator: Any) -> None:
    """Kill the workers of a loader's iterator: torch would wait 5 s for each and leave it alive."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None  # torch's handler raises an error
    try:
        for worker in iterator._workers:
            worker.kill()
        iterator._shutdown_workers()
    finally:
        if main:
            signal.signal(signal.SIGCHLD, before)
