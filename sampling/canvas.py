"""The canvas: tokens of a row, with masks at the positions to fill."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """Special tokens of the reverse process."""

    mask: int
    eos: tuple[int, ...] = ()  # end a row with `stop_at_eos`; the first fills the rest of an ended row
    stop: tuple[tuple[int, ...], ...] = ()  # sequences that end a row
    forbidden: tuple[int, ...] = ()  # never committed: those of the settings and `ids_without_token`
    is_complete: Callable[[np.ndarray], bool] | None = None  # whether a response [N] ends with its last token


@dataclass(frozen=True)
class Canvas:
    """A row to fill."""

    tokens: Sequence[int]  # [L] with masks at the positions to fill
    prompt_length: int  # tokens before the response, where blocks, guidance and rules about ends begin
    row_id: int = 0  # a row's draws depend on (seed, row_id, step) alone

    @classmethod
    def after(cls, prompt: Sequence[int], new_tokens: int, mask: int, row_id: int = 0) -> "Canvas":
        """A prompt with `new_tokens` masks after it."""
        return cls([*prompt, *[mask] * new_tokens], len(prompt), row_id)

    @property
    def name(self) -> int:
        """The former name of `row_id`."""
        return self.row_id


def ids_without_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[int, ...]:
    """Ids of a model's vocabulary that its tokenizer lacks: padding at its end, or gaps."""
    return tuple(sorted({*range(vocab_size)} - {*tokenizer.get_vocab().values()}))


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Right-align rows of different lengths.

    Returns:
        input_ids [B, L] and attention_mask [B, L], 0 at the padding.
    """
    tokens = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(tokens, padding_value=pad_token_id), pad([torch.ones_like(row) for row in tokens])


def count_positions(attention_mask: Tensor) -> Tensor:
    """[B, L] position ids of left-padded rows: attended tokens count from 0, padding has 1, as in Dream."""
    return (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)


def trim(tokens: Sequence[int], eos_token_ids: Sequence[int]) -> list[int]:
    """The tokens before the first end-of-sequence token."""
    end = next((i for i, token in enumerate(tokens) if token in eos_token_ids), len(tokens))
    return list(tokens[:end])
