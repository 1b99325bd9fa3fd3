"""Visibility: the positions that a position attends to."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sampling.transfer import to_device


@dataclass(frozen=True)
class Visibility:
    """Conditions for a position to see another. All must hold; without any, every position sees all.

    Attributes:
        attended: [B, L] bool; padding is False, and no position sees it.
        document: [B, L]; a position sees its own document only. Packed rows have several.
        block: [B, L]; a position sees its own block and earlier ones (block diffusion, arXiv 2503.09573).
        pairs: [B, L, L] bool; whether the first position sees the second. Annealed attention draws them.
        copy: [B, L] 0 for x_0, 1 and above for noised copies of it, on one canvas. A position sees its own block of
            its own copy, and the earlier blocks of x_0.
        left: [B, L] see `left_neighbour`; None: columns of a row are in order.
        causal: each block is one token, in the order of the columns: a causal kernel needs no mask.
    """

    attended: Tensor | None = None
    document: Tensor | None = None
    block: Tensor | None = None
    pairs: Tensor | None = None
    copy: Tensor | None = None
    left: Tensor | None = None
    causal: bool = False

    @property
    def needs_pairs(self) -> bool:
        """Whether only a dense mask can express it."""
        return self.block is not None or self.pairs is not None

    def rows(self, rows: Tensor) -> "Visibility":
        """Visibility of some rows [b] of the batch."""
        return self._each(lambda value: value[rows])

    def to(self, device: torch.device) -> "Visibility":
        """The same on a device."""
        return self._each(lambda value: to_device(value, device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Visibility":
        given = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(value) for name, value in given.items()})

    def dense(self, columns: Tensor | None = None) -> Tensor | None:
        """[B, Q, L] bool: whether a position sees another; None where every position sees all.

        Args:
            columns: [B, Q] positions of the queries; None for all L.
        """
        conditions = []
        if self.attended is not None:
            conditions.append(self.attended[:, None].bool())
        if self.document is not None:
            conditions.append(_of_queries(self.document, columns) == self.document[:, None])
        if self.block is not None:
            conditions.append(self._blocks(columns))
        if self.pairs is not None:
            conditions.append(self.pairs if columns is None else self.pairs.take_along_dim(columns[..., None], dim=1))
        if not conditions:
            return None
        visible = conditions[0]
        for condition in conditions[1:]:
            visible = visible & condition
        return visible

    def _blocks(self, columns: Tensor | None) -> Tensor:
        """[B, Q, L] bool: whether the block of a position lets it see another."""
        queries, keys = _of_queries(self.block, columns), self.block[:, None]
        if self.copy is None:
            return queries >= keys
        return sees_block(queries, keys, _of_queries(self.copy, columns), self.copy[:, None])

    def left_neighbour(self, row: Tensor, column: Tensor) -> Tensor:
        """[N] columns to the left of N positions, or their own columns where no visible position is left of them."""
        if self.left is not None:
            return self.left[row, column]
        left = (column - 1).clamp(min=0)
        if self.attended is not None:
            left = torch.where(self.attended[row, left].bool(), left, column)
        if self.document is not None:
            left = torch.where(self.document[row, left] == self.document[row, column], left, column)
        return left


def sees_block(block: Tensor, other_block: Tensor, copy: Tensor, other_copy: Tensor) -> Tensor:
    """Whether a position sees another on a canvas of x_0, which is copy 0, and noised copies of it."""
    own = (copy == other_copy) & (block == other_block)
    return own | ((other_copy == 0) & (block > other_block))


def _of_queries(group: Tensor, columns: Tensor | None) -> Tensor:
    """[B, Q, 1] groups of the queries."""
    return (group if columns is None else group.gather(1, columns))[..., None]
