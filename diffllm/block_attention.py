"""Attention over x_0 and noised copies of it, side by side, without a mask of the whole canvas.

On a GPU FlexAttention skips tiles without a visible pair (arXiv 2412.05496). On a CPU QUERIES queries at a time attend
to the columns that any of them sees: about L² pairs for two copies of L tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from diffllm.compilation import compile_flex, set_compiler
from sampling import Visibility
from sampling.visibility import sees_block

LEAST_HEAD = 16  # dimensions that FlexAttention takes on a GPU
QUERIES = 256  # smaller: keys are copied more often; larger: more hidden pairs are computed


class Chunk(NamedTuple):
    """Queries of the canvas, and the columns that one of them sees."""

    queries: slice
    columns: list[slice]  # of x_0, and of the queries' own copy
    mask: Tensor  # [B, 1, Q, K] 0, or -inf where a query does not see a column: SDPA would make this of a bool mask


def attention_plan(seen: Visibility) -> BlockMask | list[Chunk]:
    """Tiles or parts of a visibility with copies, for `attend` in every layer."""
    return flex_mask(seen) if seen.block.is_cuda else chunks(seen)


def chunks(seen: Visibility) -> list[Chunk]:
    """The canvas in parts, in its order."""
    rows, width = seen.block.shape
    clean = int((seen.copy == 0).sum(dim=1).max())  # where x_0 ends; a part of both sees more columns
    starts, parts = [*range(0, clean, QUERIES), *range(clean, width, QUERIES)], []
    for queries in map(slice, starts, [*starts[1:], width]):
        mask = seen.dense(torch.arange(width)[queries].expand(rows, -1))
        visible = mask.any(dim=1).any(dim=0).nonzero().squeeze(-1)
        gaps = (visible.diff() > 1).nonzero().squeeze(-1) + 1
        columns = [slice(int(part[0]), int(part[-1]) + 1) for part in visible.tensor_split(gaps)]
        hidden = ~torch.cat([mask[..., part] for part in columns], dim=-1)[:, None]
        parts.append(Chunk(queries, columns, torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)))
    return parts


def flex_mask(seen: Visibility) -> BlockMask:
    """The visibility by tiles, for FlexAttention."""
    copy, block, attended, document = seen.copy, seen.block, seen.attended, seen.document

    def sees(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible = sees_block(block[b, q], block[b, k], copy[b, q], copy[b, k])
        if attended is not None:
            visible = visible & attended[b, k].bool()
        if document is not None:
            visible = visible & (document[b, q] == document[b, k])
        return visible

    rows, width = block.shape
    set_compiler()  # of the attention too: batches differ in size, and validation has no gradients
    create = compiled_mask if block.is_cuda else create_block_mask  # uncompiled it makes the mask of the whole canvas
    return create(sees, rows, None, width, width, device=block.device)


def attend(query: Tensor, key: Tensor, value: Tensor, plan: BlockMask | list[Chunk], scale: float | None) -> Tensor:
    """[B, W, H, D] attention of queries, keys and values [B, H, W, D] by a plan."""
    if isinstance(plan, BlockMask):
        flex = compiled_flex if query.is_cuda else flex_attention
        return flex(query, key, value, block_mask=plan, scale=scale, enable_gqa=True).transpose(1, 2)
    attended = [
        F.scaled_dot_product_attention(
            query[:, :, chunk.queries],
            *(_columns(states, chunk.columns) for states in (key, value)),
            attn_mask=chunk.mask.to(query.dtype),
            scale=scale,
            enable_gqa=True,
        )
        for chunk in plan
    ]
    return torch.cat(attended, dim=2).transpose(1, 2)


def _columns(states: Tensor, parts: list[slice]) -> Tensor:
    """Keys or values [B, H, K, D] of some columns; one part is not copied."""
    return states[:, :, parts[0]] if len(parts) == 1 else torch.cat([states[:, :, part] for part in parts], dim=2)


compiled_flex, compiled_mask = (torch.compile(f, backend=compile_flex) for f in (flex_attention, create_block_mask))
