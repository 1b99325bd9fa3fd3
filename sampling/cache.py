"""Cache keys and values of canvas positions, so that a step computes only some of them.

Attention in both directions makes every position depend on every other, so a cache is an approximation until it is
refreshed. The kinds differ only in which positions a step computes:

`prefix` the open block and all that follows (Fast-dLLM, arXiv 2505.22618) · `dual` the open block alone (ibid.) ·
`delayed` all masked positions (dKV-Cache, arXiv 2505.15781). The first forward of a block and every
`cache_refresh`-th forward compute all positions; with 1 every forward does, which is exact. All kinds compute
candidates and their left neighbours, and positions that the step before changed.

In a model that attends by blocks a finished block never changes. `block` computes the open block of attention, and the
one before it once more when its tokens are clean: exact (BD3-LM, arXiv 2503.09573). The other kinds are approximate
within the open block, where `sampling.block_length` divides it (Fast-dLLM v2, arXiv 2509.26328).
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from sampling.config import SamplingConfig
from sampling.row_state import RowState
from sampling.transfer import to_device


def with_cache(config: SamplingConfig, attention_block: int | None) -> SamplingConfig:
    """Resolve `cache=auto` for a model, and set `block_length` if it attends by blocks.

    Args:
        attention_block: positions of a block of the model's attention; None if every position sees all.

    Raises:
        ValueError: `cache=block` without such blocks, or a block length that does not divide them.
    """
    if attention_block is None:
        if config.cache == "block":
            raise ValueError(
                "sampling.cache=block keeps finished blocks, which this model sees change: it was trained to attend to "
                "all positions; choose prefix, dual or delayed, or train it with diffusion=block"
            )
        return replace(config, cache="none") if config.cache == "auto" else config
    length = config.block_length or attention_block
    if attention_block % length:
        raise ValueError(
            f"sampling.block_length={length}: must divide {attention_block}, block_length in the model's config.json; "
            "null fills a whole block"
        )
    return replace(config, cache="block" if config.cache == "auto" else config.cache, block_length=length)


def needs_refresh(row: RowState) -> bool:
    """Whether the row's next forward computes all positions, or, by blocks, all that are not final."""
    if row.config.cache == "block":
        return not row.since_refresh  # later forwards compute a block or two, together with those of other rows
    every = row.config.cache_refresh
    return row.config.cache == "none" or row.step.first or (every is not None and row.since_refresh >= every)


def refreshed(row: RowState) -> np.ndarray:
    """[L] positions to the end of the open block that are not final in the cache, with their left neighbour."""
    active = np.zeros(len(row), dtype=bool)
    active[max(0, row.final - 1) : row.open_block[1]] = True
    return active


def computed(row: RowState) -> np.ndarray:
    """[L] positions that the row's next forward computes without a refresh.

    The left neighbour of each candidate is among them: models with shifted logits predict from it.
    """
    if row.config.cache == "block":
        return refreshed(row)
    step, active = row.step, np.zeros(len(row), dtype=bool)
    active[row.masked(step.end)] = True
    active[row.committed] = active[row.remasked] = True  # their keys and values are older than their tokens
    match row.config.cache:
        case "prefix":
            active[step.start :] = True
        case "dual":
            active[step.start : step.end] = True
        case "delayed":
            active |= row.tokens == row.special.mask
        case kind:
            raise NotImplementedError(f"sampling.cache={kind}")
    active[row.open_block[1] :] = False
    active[:-1] |= active[1:]
    return active


_NUMBERS = itertools.count()


class LayerStates:
    """Keys and values of one layer, [B, H, L, D]: views of buffers that stay where they are, as CUDA graphs need."""

    def __init__(self, cache: "CanvasCache"):
        self.cache = cache
        self.buffers: list[Tensor] = []
        self.keys = self.values = None

    def update(self, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Store keys and values [b, H, Q, D] of the computed columns; return those of all columns [b, H, L, D]."""
        if self.keys is None:
            self.reserve(key)
        return self._replace(self.keys, key), self._replace(self.values, value)

    def _replace(self, kept: Tensor, new: Tensor) -> Tensor:
        rows, columns = self.cache.rows, self.cache.columns
        if columns is None:
            kept[rows] = new
            return new
        kept[rows[:, None], :, columns] = new.transpose(1, 2)
        return kept if len(rows) == self.cache.n_rows else kept[rows]

    def reserve(self, like: Tensor) -> None:
        """Let the buffers hold at least the rows and the width of the cache. What they hold stays at its side.

        Args:
            like: [_, H, _, D] keys.
        """
        n_rows, width = self.cache.n_rows, self.cache.width
        held = (len(self.buffers[0]), self.buffers[0].shape[2]) if self.buffers else (0, 0)
        if held[0] < n_rows or held[1] < width:
            rows, columns = max(held[0], n_rows), max(held[1], width)
            if self.cache.at_left and held[1] < width:
                columns = max(width, held[1] * 5 // 4)  # rows grow block by block, and each copy takes time
            grown = [like.new_zeros(rows, like.shape[1], columns, like.shape[3]) for _ in range(2)]
            for new, old in zip(grown, self.buffers, strict=False):
                new[: held[0], :, self._side(columns, held[1])] = old
            self.buffers = grown
            self.cache.generation += 1
        self.keys, self.values = (buffer[:n_rows, :, self._side(buffer.shape[2], width)] for buffer in self.buffers)

    def _side(self, columns: int, width: int) -> slice:
        """The side of a buffer where rows of this width are."""
        return slice(width) if self.cache.at_left else slice(columns - width, None)


class CanvasCache(Cache):
    """Keys and values of whole canvases. A forward replaces those of some columns.

    Args:
        round_to: the number of computed columns is a multiple of it plus one, for a block and its left neighbour, so
            that shapes occur again.

    Attributes:
        rows: [b] rows that the next forward computes.
        columns: [b, Q] positions that it computes; None for all.
        place: [b, L] index of each position among the columns.
        generation: number of times that a buffer was made.
    """

    def __init__(self, round_to: int = 1):
        super().__init__(layers=[])
        self.number = next(_NUMBERS)
        self.kept: list[LayerStates] = []
        self.round_to, self.width, self.n_rows, self.generation = round_to, 0, 0, 0
        self.at_left = False
        self.rows = self.columns = self.place = None

    def arrange(self, kept: Sequence[int | None], width: int, at_left: bool = False) -> None:
        """Reorder rows as the batch did; pad or cut them at the left.

        Args:
            kept: the old index of each row, None for a new one.
            at_left: rows are aligned at the left; pad or cut them at the right.
        """
        self.at_left = at_left
        new = [i for i, before in enumerate(kept) if before is not None]
        old = [kept[i] for i in new]
        self.n_rows, self.width = len(kept), width
        for layer in self.kept:
            layer.reserve(layer.buffers[0])
        if new == old or not self.kept:
            return
        device = self.kept[0].buffers[0].device
        new, old = to_device(torch.tensor([new, old]), device)
        for layer in self.kept:
            for buffer in layer.buffers:
                buffer[new] = buffer[old]

    def clear(self) -> None:
        """Forget all keys and values: one that is no number would spoil the attention even where it is not seen."""
        for layer in self.kept:
            for buffer in layer.buffers:
                buffer.zero_()

    def select(self, rows: Tensor, active: np.ndarray | None) -> None:
        """Choose the rows and columns that the next forward computes.

        Args:
            rows: [b] indices in the batch.
            active: [b, L] bool, positions to compute; None for all.
        """
        self.rows = rows
        if active is None:
            self.columns = self.place = None
            return
        # A row with fewer positions repeats its first one, which has the same keys and values each time.
        most = -(-(active.sum(1).max() - 1) // self.round_to) * self.round_to + 1
        order = np.argsort(~active, axis=1, kind="stable")[:, :most]
        repeated = np.arange(order.shape[1]) >= active.sum(1)[:, None]
        columns = np.where(repeated, order[:, :1], order)
        self.columns = to_device(torch.from_numpy(columns), rows.device)
        self.place = to_device(torch.from_numpy(active.cumsum(1) - 1), rows.device)

    def indices(self) -> list[Tensor]:
        """Rows and columns that the next forward computes."""
        return [self.rows] if self.columns is None else [self.rows, self.columns]

    def use_copies(self) -> list[Tensor]:
        """Let the next forward take copies of the `indices`, which are returned: a graph reads them again and again."""
        copies = [index.clone() for index in self.indices()]
        self.rows, self.columns = copies[0], copies[1] if len(copies) > 1 else None
        return copies

    def shape(self) -> tuple[int, ...]:
        """Equal for forwards that read and write the same memory, whatever rows and columns they compute."""
        return self.number, self.generation, self.n_rows, self.width

    def of_layer(self, number: int) -> LayerStates:
        """Keys and values of a layer."""
        while number >= len(self.kept):
            self.kept.append(LayerStates(self))
        return self.kept[number]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """See `LayerStates.update`."""
        return self.of_layer(layer_idx).update(key, value)

    def __bool__(self) -> bool:
        return True  # its length, by Transformers, is 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width, 0
