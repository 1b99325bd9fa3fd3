"""Batches as functions of the step number, so that a step number is enough to resume exactly."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from data.collate import assemble, response_widths
from data.config import DataConfig
from data.packing import first_fit
from data.report import Report
from data.token_rows import TokenRows
from data.workers import Batch, from_workers, to_device_ready

Noise = Callable[[Batch, int], Batch]  # (batch, epoch) → batch with x_t, see diffllm.diffusion.objective


class Stream(IntEnum):
    """First word of the key of each random stream, so that no two draws share a key."""

    ORDER = 1  # of the rows in an epoch
    CUT = 2  # of a batch
    NOISE = 3
    ATTENTION = 4  # while it is annealed
    WINDOW = 5  # order of the rows in a window of `data.streaming`


@dataclass(frozen=True)
class BatchLayout:
    """The part of each global batch that one rank forwards."""

    rank: int
    ranks: int
    micro_batch_size: int
    micro_batches: int

    @property
    def global_batch_size(self) -> int:
        return self.ranks * self.micro_batch_size * self.micro_batches

    def slots(self, micro_batch: int) -> np.ndarray:
        """[micro_batch_size] places of a micro-batch's rows in the global batch."""
        first = (self.rank * self.micro_batches + micro_batch) * self.micro_batch_size
        return np.arange(first, first + self.micro_batch_size)


class BatchSource(Protocol):
    """Batches for the training loop."""

    layout: BatchLayout
    steps_per_epoch: int | None  # None for a stream, whose length is unknown
    report: Report | None  # on the rows read in this run, of a stream

    def loader(self, steps: range) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches, step by step."""

    def identity(self) -> tuple[int, str]:
        """Number of rows, 0 if unknown, and a fingerprint of the rows, their order and the tokenizer."""

    def epoch(self, step: int) -> float:
        """Passes over the rows after `step` steps."""

    def position(self, step: int) -> dict[str, int]:
        """State to resume after `step` steps; empty if the step number is enough.

        Args:
            step: number of steps after the last item of `loader`, or before it.
        """

    def resume(self, position: dict[str, int]) -> None:
        """Let `loader` start at a position of an earlier run."""


class TrainBatches(Dataset):
    """Dataset whose item s holds this rank's micro-batches of the step that follows s optimizer steps.

    Each epoch visits the rows in a new order and leaves out those that do not fill a global batch. An epoch of a
    mixture has as many rows as all sources together; a row can occur several times, each time with other noise.

    Raises:
        ValueError: fewer rows than a global batch.
    """

    report = None

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
            batch |= {"repeat": repeats[slots], "step": np.full_like(slots, step)}
            batches.append(self.noise(to_torch(batch, slots, self.layout.global_batch_size), epoch))
        return batches

    def plan(self, step: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, sample indices [B], how often each occurred earlier in the epoch [B], and response widths [B]."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order, repeats = self.order(epoch)
        first = step_in_epoch * self.layout.global_batch_size
        part = slice(first, first + self.layout.global_batch_size)
        samples = order[part]
        widths = response_widths(
            self.rows.prompt_lengths[samples],
            self.rows.response_lengths[samples],
            self.config,
            np.random.default_rng((Stream.CUT, self.seed, epoch, step_in_epoch)),
        )
        return epoch, samples, repeats[part], widths

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """[rows] sample indices in the order of an epoch, and how often each occurred before. Caches one epoch."""
        if epoch != self._epoch:
            rng = np.random.default_rng((Stream.ORDER, self.seed, epoch))
            order = rng.permutation(len(self.rows))
            if self.config.mixture:
                weights = dict(zip(self.config.train_files, self.config.mixture, strict=True))
                order = mix(self.rows.column("source"), weights, rng)
            order = order[: self.steps_per_epoch * self.layout.global_batch_size]
            if self.config.group_by_length:
                order = group_by_length(order, self.rows.lengths, self.layout.global_batch_size, rng)
            if self.config.order == "curriculum":
                order = order[np.argsort(self.rows.column("difficulty")[order], kind="stable")]
                # Shuffle within each batch: the place of a row decides how much of it is masked.
                order = rng.permuted(order.reshape(-1, self.layout.global_batch_size), axis=1).ravel()
            self._epoch, self._order, self._repeats = epoch, order, _repeats(order)
        return self._order, self._repeats

    def first_epoch(self, sources: int) -> np.ndarray:
        """[sources] rows of each source in the first epoch, repetitions included."""
        return np.bincount(self.rows.column("source")[self.order(0)[0]], minlength=sources)

    def padding_share(self, steps: int = 50) -> float:
        """Share of padding among all positions, estimated from some steps of the first epoch."""
        own = positions = 0
        for step in np.unique(np.linspace(0, self.steps_per_epoch - 1, steps).astype(int)).tolist():
            _, samples, _, widths = self.plan(step)
            kept = self.rows.prompt_lengths[samples] + widths
            own += np.minimum(kept, self.rows.lengths[samples]).sum()
            for lengths in kept.reshape(-1, self.layout.micro_batch_size):
                size = self.config.max_length if self.config.packing else 0
                packed = [lengths[rows].sum() for rows in first_fit(lengths, size)]
                positions += min(len(packed) * max(packed), len(lengths) * lengths.max())
        return 1 - own / positions

    def loader(self, steps: range) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches, step by step; in pinned memory if there is a GPU."""
        with closing(from_workers(self, self.config.num_workers, steps)) as items:
            yield from map(to_device_ready, items)

    def identity(self) -> tuple[int, str]:
        """Number of rows, and their fingerprint."""
        return len(self.rows), self.rows.fingerprint()

    def epoch(self, step: int) -> float:
        """Passes over the rows after `step` steps."""
        return step / self.steps_per_epoch

    def position(self, step: int) -> dict[str, int]:
        """Empty: a batch is a function of its step number."""
        return {}

    def resume(self, position: dict[str, int]) -> None:
        """Do nothing: a batch is a function of its step number."""


def group_by_length(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, rng: np.random.Generator, pool: int = 50
) -> np.ndarray:
    """Reorder rows so that rows of similar length share a batch.

    Sorts each `pool` successive batches by length and cuts them into batches again. Shuffles the batches, and the rows
    within each: a rank forwards neighbouring rows, and all ranks should have equal work.

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
    """[rows] sample indices, as many of each source as its weight gives. All its rows are used before any repeats.

    Args:
        source: [rows] index of each row's source.
        weights: of the sources, by their names.

    Raises:
        ValueError: a source has no rows, or its weight is too small for one row.
    """
    setting = f"data.mixture={list(weights.values())}"
    shares = np.array(list(weights.values())) / sum(weights.values())
    bounds = np.round(np.cumsum([0, *shares]) * len(source)).astype(int)
    picked = []
    for number, (name, count) in enumerate(zip(weights, np.diff(bounds), strict=True)):
        rows = np.flatnonzero(source == number)
        if not len(rows):
            raise ValueError(f"{setting}: no row of {name} is left")
        if not count:
            raise ValueError(f"{setting}: no row of {name} is among the {len(source)} of an epoch")
        turns = -(-count // len(rows))
        picked.append(np.concatenate([rng.permutation(rows) for _ in range(turns)])[:count])
    return rng.permutation(np.concatenate(picked))


def _repeats(order: np.ndarray) -> np.ndarray:
    """[rows] how often each sample index occurred before."""
    by_sample = np.argsort(order, kind="stable")
    first = np.searchsorted(order[by_sample], order)
    place = np.empty(len(order), dtype=np.int64)
    place[by_sample] = np.arange(len(order))
    return place - first


class ValBatches:
    """Validation batches of one rank, the same at every iteration: uncut rows with the noise of epoch 0.

    Every rank has the same number of batches, since all ranks forward together. Places left in the last batches hold
    the first row with nothing to mask.
    """

    def __init__(self, rows: TokenRows, layout: BatchLayout, eos_token_id: int, noise: Noise):
        self.rows, self.layout, self.eos_token_id, self.noise = rows, layout, eos_token_id, noise

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.layout.micro_batch_size * self.layout.ranks))

    def __iter__(self):
        size, ranks = self.layout.micro_batch_size, self.layout.ranks
        for number in range(len(self)):
            start = (number * ranks + self.layout.rank) * size
            slots = np.arange(start, start + size)
            real = slots < len(self.rows)
            samples = np.where(real, slots, 0)
            rows = assemble(self.rows, samples, self.rows.response_lengths[samples], self.eos_token_id)
            batch = to_torch(rows, samples, len(self.rows))
            batch["maskable"] &= torch.from_numpy(real)[:, None]
            yield self.noise(batch, 0)


def to_torch(batch: dict[str, np.ndarray], slots: np.ndarray, batch_size: int) -> Batch:
    """Convert arrays to tensors; add slot [B], the rows' places in the global batch, and its batch_size [B]."""
    placed = {**batch, "slot": slots, "batch_size": np.full_like(slots, batch_size)}
    return {name: torch.from_numpy(array) for name, array in placed.items()}
