"""The canvas: prompts followed by the positions to fill."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Right-align prompts of different lengths.

    Returns:
        input_ids [B, P] and attention_mask [B, P], 0 at the padding.
    """
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask


def open_canvas(
    input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, mask_token_id: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Append `max_new_tokens` masks to every row.

    Args:
        input_ids: [B, P] prompts, left-padded where shorter.
        attention_mask: [B, P], 0 at the padding; None where no row is padded.

    Returns:
        The canvas [B, L], its attention_mask [B, L] and its position_ids [B, L], L = P + max_new_tokens. The last two
        are None if no row is padded. Positions count the attended tokens; padding sits at position 1, as in Dream.

    Raises:
        ValueError: a zero in the attention mask to the right of a one.
    """
    canvas = F.pad(input_ids, (0, max_new_tokens), value=mask_token_id)
    if attention_mask is None or bool(attention_mask.all()):
        return canvas, None, None
    attention_mask = attention_mask.long()
    if bool((attention_mask.diff(dim=-1) < 0).any()):
        raise ValueError("attention_mask has padding to the right of tokens: pad prompts on the left")
    attention_mask = F.pad(attention_mask, (0, max_new_tokens), value=1)
    position_ids = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    return canvas, attention_mask, position_ids


def trim(tokens: Sequence[int], eos_token_ids: Sequence[int]) -> list[int]:
    """The tokens before the first end-of-sequence token."""
    end = next((i for i, token in enumerate(tokens) if token in eos_token_ids), len(tokens))
    return list(tokens[:end])
