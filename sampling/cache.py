"""Cache keys and values of canvas positions, so that a step computes only some of them.

Attention in both directions makes every position depend on every other, so a cache is an approximation until it is
refreshed. The kinds differ only in which positions a step computes:

`prefix` from the start of the open block on: prompt and finished blocks are kept (Fast-dLLM, arXiv 2505.22618) ·
`dual` the open block: what follows it is kept too (ibid.) · `delayed` all masked positions and what changed in the step
before (dKV-Cache, arXiv 2505.15781). All positions are computed where a
block starts and every `cache_refresh` forwards; with 1 nothing is approximate.
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

    The left neighbour of each candidate is among them: models with shifted logits predict from there.
    """
    step, active = row.step, np.zeros(len(row), dtype=bool)
    active[row.masked(step.end)] = True
    active |= row.changed  # keys and values that were made before the change
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
        place: [b, L] where among them a position is.
    """

    def __init__(self):
        super().__init__(layers=[])
        self.kept: list[list[Tensor]] = []  # of each layer, keys and values
        self.width = self.rows_kept = 0
        self.rows = self.columns = self.place = None

    def arrange(self, kept: Sequence[int | None], width: int) -> None:
        """Follow the batch: its row i was row kept[i] before, or is new; right-aligned rows are now `width` wide."""
        old = [i for i, before in enumerate(kept) if before is not None]
        before = [kept[i] for i in old]
        for layer in self.kept:
            for i, states in enumerate(layer):
                arranged = states.new_zeros(len(kept), states.shape[1], width, states.shape[3])
                grown = F.pad(states[before], (0, 0, width - self.width, 0))  # a negative width cuts
                arranged[old] = grown
                layer[i] = arranged
        self.width = width

    def aim(self, rows: Tensor, batch_size: int, active: np.ndarray | None) -> None:
        """Say what the next forward computes.

        Args:
            rows: [b] those of the batch that it forwards.
            active: [b, L] positions of them; None for all.
        """
        self.rows, self.rows_kept = rows, batch_size
        if active is None:
            self.columns = self.place = None
            return
        # Rows with fewer positions repeat their first: it gives the same keys and values again.
        order = np.argsort(~active, axis=1, kind="stable")[:, : active.sum(1).max()]
        repeated = np.arange(order.shape[1]) >= active.sum(1)[:, None]
        columns = np.where(repeated, order[:, :1], order)
        self.columns = torch.from_numpy(columns).to(rows.device)
        self.place = torch.from_numpy(active.cumsum(1) - 1).to(rows.device)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: object, **kwargs: object):
        """Take the computed columns' keys and values [b, H, Q, D]; give those of all columns [b, H, L, D]."""
        if layer_idx == len(self.kept):
            empty = key.new_zeros(self.rows_kept, key.shape[1], self.width, key.shape[3])
            self.kept.append([empty, empty.clone()])
        return tuple(self._replace(kept, new) for kept, new in zip(self.kept[layer_idx], (key, value), strict=True))

    def _replace(self, kept: Tensor, new: Tensor) -> Tensor:
        if self.columns is None:
            kept[self.rows] = new
            return new
        kept[self.rows[:, None], :, self.columns] = new.transpose(1, 2)
        return kept if len(self.rows) == self.rows_kept else kept[self.rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width, 0
