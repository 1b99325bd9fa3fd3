"""Cache keys and values of canvas positions, so that a step computes only some of them.

Attention in both directions makes every position depend on every other, so a cache is an approximation until it is
refreshed. The kinds differ only in which positions a step computes:

`prefix` the open block and all that follows (Fast-dLLM, arXiv 2505.22618) · `dual` the open block alone (ibid.) ·
`delayed` all masked positions (dKV-Cache, arXiv 2505.15781). The first forward
of a block and every `cache_refresh`-th forward compute all positions; with 1 every forward does, which is exact.
All kinds compute candidates and their left neighbours, and positions that the step before changed.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from sampling.row_state import RowState


def needs_refresh(row: RowState) -> bool:
    """Whether the row's next forward computes all positions."""
    every = row.config.cache_refresh
    return row.config.cache == "none" or row.step.first or (every is not None and row.since_refresh >= every)


def computed(row: RowState) -> np.ndarray:
    """[L] positions that the row's next forward computes without a refresh.

    The left neighbour of each candidate is among them: models with shifted logits predict from it.
    """
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
    active[:-1] |= active[1:]
    return active


class CanvasCache(Cache):
    """Keys and values of whole canvases, [B, H, L, D] a layer, of which a forward replaces some columns.

    Attributes:
        columns: [b, Q] positions that the next forward computes; None for all.
        place: [b, L] index of each position among the columns.
    """

    def __init__(self):
        super().__init__(layers=[])
        self.kept: list[list[Tensor]] = []  # of each layer, keys and values
        self.width = self.n_rows = 0
        self.rows = self.columns = self.place = None

    def arrange(self, kept: Sequence[int | None], width: int) -> None:
        """Reorder rows as the batch did; pad or cut them to `width`. kept[i] is the old index of row i, None if new."""
        old = [i for i, before in enumerate(kept) if before is not None]
        before = [kept[i] for i in old]
        for layer in self.kept:
            for i, states in enumerate(layer):
                arranged = states.new_zeros(len(kept), states.shape[1], width, states.shape[3])
                grown = F.pad(states[before], (0, 0, width - self.width, 0))  # a negative width cuts
                arranged[old] = grown
                layer[i] = arranged
        self.width = width

    def select(self, rows: Tensor, batch_size: int, active: np.ndarray | None) -> None:
        """Choose the rows and columns that the next forward computes.

        Args:
            rows: [b] indices in the batch.
            active: [b, L] bool, positions to compute; None for all.
        """
        self.rows, self.n_rows = rows, batch_size
        if active is None:
            self.columns = self.place = None
            return
        # A row with fewer positions repeats its first one, which has the same keys and values each time.
        order = np.argsort(~active, axis=1, kind="stable")[:, : active.sum(1).max()]
        repeated = np.arange(order.shape[1]) >= active.sum(1)[:, None]
        columns = np.where(repeated, order[:, :1], order)
        self.columns = torch.from_numpy(columns).to(rows.device)
        self.place = torch.from_numpy(active.cumsum(1) - 1).to(rows.device)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: object, **kwargs: object):
        """Store keys and values [b, H, Q, D] of the computed columns; return those of all columns [b, H, L, D]."""
        if layer_idx == len(self.kept):
            empty = key.new_zeros(self.n_rows, key.shape[1], self.width, key.shape[3])
            self.kept.append([empty, empty.clone()])
        return tuple(self._replace(kept, new) for kept, new in zip(self.kept[layer_idx], (key, value), strict=True))

    def _replace(self, kept: Tensor, new: Tensor) -> Tensor:
        if self.columns is None:
            kept[self.rows] = new
            return new
        kept[self.rows[:, None], :, self.columns] = new.transpose(1, 2)
        return kept if len(self.rows) == self.n_rows else kept[self.rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width, 0
