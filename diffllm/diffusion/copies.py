"""x_0 and noised copies of it on one canvas, without the positions that the loss does not depend on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data import Batch
from diffllm.attention import visibility_of
from sampling import Visibility


@dataclass(frozen=True)
class Copies:
    """Positions [B, W] of x_0 and its noised copies, in this order, padded at the right.

    Attributes:
        column: the column [B, L] of a row that a position is from.
        attended: bool, False at padding.
        masked: bool, the positions to restore.
    """

    column: Tensor
    attended: Tensor
    masked: Tensor
    visibility: Visibility

    def take(self, values: Tensor) -> Tensor:
        """[B, W] of values [B, L]."""
        return values.gather(1, self.column)


def side_by_side(batch: Batch, masked: Tensor) -> Copies:
    """Lay out the positions that the loss depends on.

    Args:
        batch: attention_mask and block [B, L], optional document [B, L].
        masked: [B, C, L] bool, the tokens that each noised copy masks.
    """
    length, needed = masked.shape[-1], needed_positions(batch, masked).flatten(1)
    counts = needed.sum(dim=1, keepdim=True)
    attended = torch.arange(int(counts.max())) < counts
    index = needed.byte().argsort(dim=1, descending=True, stable=True)[:, : attended.shape[1]]
    index = torch.where(attended, index, index[:, :1])  # padding sees what the first position sees
    copy, column = index // length, index % length

    row = visibility_of(batch)
    left = row.left_neighbour(*torch.ones_like(batch["block"]).nonzero(as_tuple=True)).view_as(batch["block"])
    own = batch["block"].gather(1, left) == batch["block"]  # else the neighbour is clean, as in sampling
    before = torch.where(own.gather(1, column), copy, 0) * length + left.gather(1, column)
    visibility = Visibility(
        attended=None if attended.all() else attended,
        document=None if row.document is None else row.document.gather(1, column),
        block=row.block.gather(1, column),
        copy=copy,
        left=(needed.cumsum(1) - 1).gather(1, before),
    )
    noised = torch.cat([torch.zeros_like(masked[:, :1]), masked], dim=1).flatten(1)
    return Copies(column, attended, noised.gather(1, index) & attended, visibility)


def needed_positions(batch: Batch, masked: Tensor) -> Tensor:
    """[B, 1 + C, L] bool: noised blocks with masked tokens, and the blocks of x_0 before one of them.

    Of a row without masked tokens x_0 is taken: a query must see something.
    """
    attended, document = batch["attention_mask"].bool(), documents(batch)
    block = document * (batch["block"].max() + 1) + batch["block"]
    noised = highest(masked.long(), block[:, None].expand_as(masked)).bool() & attended[:, None]
    last = highest(torch.where(noised.any(dim=1), block, -1), document)
    clean = attended & ((block < last) | ~masked.flatten(1).any(dim=1, keepdim=True))
    return torch.cat([clean[:, None], noised], dim=1)


def documents(batch: Batch) -> Tensor:
    """[B, L] number of each position's document among those of the batch; 0 where rows are not packed."""
    return batch.get("document", torch.zeros_like(batch["block"])).unique(return_inverse=True)[1]


def highest(values: Tensor, group: Tensor) -> Tensor:
    """[..., L] the highest of the values [..., L] of a position's group in its row."""
    found = values.new_zeros(*values.shape[:-1], int(group.max()) + 1)
    return found.scatter_reduce(-1, group, values, "amax", include_self=False).gather(-1, group)
