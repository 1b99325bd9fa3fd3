"""Batches as pure functions of their number, so that a position is one integer and resuming is exact."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.config import DataConfig
from data.cutoff import assemble, response_widths
from data.tokens import TokenRows

Batch = dict[str, Tensor]
Noise = Callable[[Batch, int], Batch]  # (batch, epoch) → batch with x_t


class BatchSource(Protocol):
    pass


_ORDER, CUT = 1, 2  # first words of the keys, so that no two draws share one


@dataclass(frozen=True)
class BatchLayout:
    """The part of each global batch that one rank works on."""

    rank: int
    ranks: int
    micro_batch_size: int
    micro_batches: int

    @property
    def global_batch_size(self) -> int:
        return self.ranks * self.micro_batch_size * self.micro_batches

    def slots(self, micro_batch: int) -> np.ndarray:
        """Places in the global batch of the rows of one micro-batch."""
        first = (self.rank * self.micro_batches + micro_batch) * self.micro_batch_size
        return np.arange(first, first + self.micro_batch_size)


class TrainBatches(Dataset):
    """Item s is what this rank forwards in optimizer step s: a list of micro-batches.

    Rows are visited in a new order every epoch; the few that do not fill a global batch wait for the next epoch. In a
    mixture an epoch has as many rows, some of them repeatedly: each time with other noise.

    Raises:
        ValueError: there are fewer rows than a global batch has.
    """

    def __init__(
        self, rows: TokenRows, config: DataConfig, layout: BatchLayout, eos_token_id: int, noise: Noise, seed: int
    ):
        if len(rows) < layout.global_batch_size:
            raise ValueError(
                f"data.train_batch_size={layout.global_batch_size}: more than the {len(rows)} training rows; lower it"
            )
        self.rows, self.config, self.layout = rows, config, layout
        self.eos_token_id, self.noise, self.seed = eos_token_id, noise, seed
        self.steps_per_epoch = len(rows) // layout.global_batch_size
        self._epoch, self._order, self._repeats = -1, np.empty(0, np.int64), np.empty(0, np.int64)

    def __getitem__(self, step: int) -> list[Batch]:
        epoch, samples, repeats, widths = self.plan(step)
        batches = []
        for micro_batch in range(self.layout.micro_batches):
            slots = self.layout.slots(micro_batch)
            batch = assemble(self.rows, samples[slots], widths[slots], self.eos_token_id)
            batch["repeat"] = repeats[slots]
            batches.append(self.noise(to_torch(batch, slots, self.layout.global_batch_size), epoch))
        return batches

    def plan(self, step: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, sample indices [B], how often they came in the epoch before [B], and response widths [B] of a step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order, repeats = self.order(epoch)
        here = slice(step_in_epoch * self.layout.global_batch_size, (step_in_epoch + 1) * self.layout.global_batch_size)
        samples = order[here]
        widths = response_widths(
            self.rows.prompt_lengths[samples],
            self.rows.response_lengths[samples],
            self.config,
            np.random.default_rng((CUT, self.seed, epoch, step_in_epoch)),
        )
        return epoch, samples, repeats[here], widths

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample indices in the order of an epoch, and how often each came before; those of the last epoch are kept."""
        if epoch != self._epoch:
            rng = np.random.default_rng((_ORDER, self.seed, epoch))
            order = rng.permutation(len(self.rows))
            if self.config.mixture:
                weights = dict(zip(self.config.train_files, self.config.mixture, strict=True))
                order = mix(self.rows.column("source"), weights, rng)
            order = order[: self.steps_per_epoch * self.layout.global_batch_size]
            if self.config.group_by_length:
                order = group_by_length(order, self.rows.lengths, self.layout.global_batch_size, rng)
            if self.config.order == "curriculum":
                order = order[np.argsort(self.rows.column("difficulty")[order], kind="stable")]
                # within a batch in any order: the place decides how much of a row is masked
                order = rng.permuted(order.reshape(-1, self.layout.global_batch_size), axis=1).ravel()
            self._epoch, self._order, self._repeats = epoch, order, _repeats(order)
        return self._order, self._repeats

    def first_epoch(self, sources: int) -> np.ndarray:
        """[sources] how many rows of each the first epoch has; a row may come several times."""
        return np.bincount(self.rows.column("source")[self.order(0)[0]], minlength=sources)

    def padding_share(self, steps: int = 50) -> float:
        """Positions that are not a row's own tokens, among all that some steps of the first epoch forward."""
        own = positions = 0
        for step in np.unique(np.linspace(0, self.steps_per_epoch - 1, steps).astype(int)).tolist():
            _, samples, _, widths = self.plan(step)
            kept = self.rows.prompt_lengths[samples] + widths
            own += np.minimum(kept, self.rows.lengths[samples]).sum()
            positions += kept.reshape(-1, self.layout.micro_batch_size).max(-1).sum() * self.layout.micro_batch_size
        return 1 - own / positions

    def loader(self, steps: range) -> Iterator[list[Batch]]:
        """Iterate over steps, made ahead of time in worker processes; in pinned memory if there is a GPU."""
        workers = self.config.num_workers
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            collate_fn=to_numpy,
            worker_init_fn=follow_rank,
        )
        with closing(each(loader)) as items:
            yield from map(to_device_ready, items)

    def position(self, step: int) -> dict[str, int]:
        """Nothing: the step number is enough to resume."""
        return {}

    def resume(self, position: dict[str, int]) -> None:
        """Nothing has to be restored."""

    def identity(self) -> tuple[int, str]:
        """Number of rows, and what tells them from others: data, order, and the tokenizer with its template."""
        return len(self.rows), self.rows.fingerprint()

    def epoch(self, step: int) -> float:
        """Passes over the rows after so many steps."""
        return step / self.steps_per_epoch


def group_by_length(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, rng: np.random.Generator, pool: int = 50
) -> np.ndarray:
    """Reorder whole batches so that rows of like length share one.

    Each `pool` batches in a row are sorted by length and cut into batches again. Batches then come in random order, and
    so do the rows within, since a rank's rows are neighbours and ranks should have the same work.

    Args:
        order: sample indices; those that do not fill a batch are left out.
        lengths: [rows] tokens.
    """
    whole = order[: len(order) // batch_size * batch_size]
    pools = np.split(whole, range(pool * batch_size, len(whole), pool * batch_size))
    batches = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in pools]).reshape(-1, batch_size)
    rng.shuffle(batches)
    return rng.permuted(batches, axis=1).ravel()


def mix(source: np.ndarray, weights: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """As many sample indices as there are rows, from each source by its weight: all its rows in turn, in random order.

    Args:
        source: [rows] which source a row is from.
        weights: of the sources, by their names.

    Raises:
        ValueError: a source without rows, or with a weight that gives it none.
    """
    said = f"data.mixture={list(weights.values())}"
    shares = np.array(list(weights.values())) / sum(weights.values())
    bounds = np.round(np.cumsum([0, *shares]) * len(source)).astype(int)
    picked = []
    for number, (name, count) in enumerate(zip(weights, np.diff(bounds), strict=True)):
        rows = np.flatnonzero(source == number)
        if not len(rows):
            raise ValueError(f"{said}: no row of {name} is left")
        if not count:
            raise ValueError(f"{said}: no row of {name} is among the {len(source)} of an epoch")
        turns = -(-count // len(rows))
        picked.append(np.concatenate([rng.permutation(rows) for _ in range(turns)])[:count])
    return rng.permutation(np.concatenate(picked))


def _repeats(order: np.ndarray) -> np.ndarray:
    """[rows] how often each sample index came before."""
    by_sample = np.argsort(order, kind="stable")
    first = np.searchsorted(order[by_sample], order)
    place = np.empty(len(order), dtype=np.int64)
    place[by_sample] = np.arange(len(order))
    return place - first


def to_numpy(micro_batches: list[Batch]) -> list[dict[str, np.ndarray]]:
    """Arrays go from process to process in a quarter of the time that tensors of this size need."""
    return [{name: tensor.numpy() for name, tensor in batch.items()} for batch in micro_batches]


def to_device_ready(micro_batches: list[dict[str, np.ndarray]]) -> list[Batch]:
    """Back to tensors, in pinned memory if there is a GPU."""
    tensors = [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in micro_batches]
    if not torch.cuda.is_available():
        return tensors
    return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in tensors]


def follow_rank(worker: int) -> None:
    """Let a worker live as long as its rank: ignore signals, which a cluster sends to all, and end with the rank.

    A rank that is asked to stop needs batches until its step ends. A worker does not notice a rank that was killed: it
    waits for room in a pipe that it holds open itself.

    Args:
        worker: number of this one, unused.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="rank").start()


def each(loader: DataLoader) -> Iterator[Any]:
    """Iterate over a loader; its workers end with the iteration, also where that is closed or fails.

    A traceback can hold the iterator up to the end of the process, which then waits for workers that wait for it.
    """
    iterator = iter(loader)
    try:
        yield from iterator
    except BaseException:
        if loader.num_workers:
            _kill_workers(iterator)
        raise


def _kill_workers(iterator: Any) -> None:
    """End the workers of a loader's iterator, whatever they do: torch would wait 5 s for each, and then let it be."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None  # torch raises an error there
    try:
        for worker in iterator._workers:
            worker.kill()
        iterator._shutdown_workers()
    finally:
        if main:
            signal.signal(signal.SIGCHLD, before)


class ValBatches:
    """Validation batches of one rank, the same at every call: uncut rows with the noise of epoch 0.

    Every rank gets the same number of batches, since they forward together; where rows run out, the first row stands in
    with nothing masked.
    """

    def __init__(self, rows: TokenRows, layout: BatchLayout, eos_token_id: int, noise: Noise):
        self.rows, self.layout, self.eos_token_id, self.noise = rows, layout, eos_token_id, noise

    def __iter__(self):
        size, ranks = self.layout.micro_batch_size, self.layout.ranks
        for start in range(self.layout.rank * size, -(-len(self.rows) // (size * ranks)) * size * ranks, size * ranks):
            slots = np.arange(start, start + size)
            real = slots < len(self.rows)
            samples = np.where(real, slots, 0)
            batch = to_torch(
                assemble(self.rows, samples, self.rows.response_lengths[samples], self.eos_token_id),
                slots,
                len(self.rows),
            )
            batch["maskable"] &= torch.from_numpy(real)[:, None]
            yield self.noise(batch, 0)


def to_torch(batch: dict[str, np.ndarray], slots: np.ndarray, batch_size: int) -> Batch:
    placed = {**batch, "slot": slots, "batch_size": np.full_like(slots, batch_size)}
    return {name: torch.from_numpy(array) for name, array in placed.items()}
