"""The reverse process of absorbing-state diffusion: a masked canvas is filled in a few model calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sampling.canvas import open_canvas
from sampling.confidence import priority, propose
from sampling.config import SamplingConfig
from sampling.transfer import even, share_steps, time_grid


class Denoiser(Protocol):
    """Any model that gives logits for the tokens under the masks."""

    def __call__(
        self, x_t: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, where: Tensor | None = None
    ) -> Tensor:
        """Logits of the clean token: [N, V] at the N positions of `where` [B, L], [B, L, V] without it."""


LogitsHook = Callable[[int, Tensor, Tensor], Tensor]
TokensHook = Callable[[int | None, Tensor, Tensor | None], Tensor]


@dataclass
class SampleOutput:
    sequences: Tensor  # [B, L] prompt and response
    nfe: int  # number of function evaluations: forwards of the model
    history: list[Tensor] | None = None  # the canvas [B, L] after every step


@torch.no_grad()
def sample(
    denoise: Denoiser,
    input_ids: Tensor,
    config: SamplingConfig,
    mask_token_id: int,
    attention_mask: Tensor | None = None,
    rows: Sequence[int] | None = None,
    output_history: bool = False,
    tokens_hook: TokensHook | None = None,
    logits_hook: LogitsHook | None = None,
) -> SampleOutput:
    """Fill `config.max_new_tokens` masks after each prompt, and masks inside the prompts too.

    Every step asks for the logits of the masked positions, draws a token for each, and commits the surest. A step that
    commits nothing needs no logits and is skipped, unless a hook wants to see it.

    Args:
        input_ids: [B, P] prompts, left-padded.
        attention_mask: [B, P], 0 at the padding.
        rows: B numbers that name the rows: a row's draws depend on (config.seed, its number, step) alone, so that its
            tokens do not depend on its batch. Default: 0 … B-1.
        tokens_hook: `x = hook(step, x, logits)` after each step, and once before the first with (None, x, None).
        logits_hook: `logits = hook(step, x, logits)` on all logits [B, L, V] before anything is drawn.
    """
    x, attention_mask, position_ids = open_canvas(input_ids, attention_mask, config.max_new_tokens, mask_token_id)
    lengths = [x.shape[1]] * len(x) if attention_mask is None else attention_mask.sum(-1).tolist()
    rows = range(len(x)) if rows is None else rows
    hooked = tokens_hook is not None or logits_hook is not None
    history: list[Tensor] | None = [] if output_history else None
    nfe = 0
    if tokens_hook is not None:
        x = tokens_hook(None, x, None)

    for step, in_block, position, block_steps in plan_steps(x.shape[1], config):
        # 1. where: the masked positions of the open block
        where = (x == mask_token_id) & in_block.to(x.device)
        n_masked = where.sum(-1)
        if position == 0:
            n_at_start = n_masked
        # 2. how many
        if config.transfer == "even":
            n_commit = even(position, block_steps, n_at_start, n_masked)
        else:
            n_commit = time_grid(position, block_steps, config.eps, n_masked)
        # 3. which tokens, and which of them stay
        logits = None
        if hooked or bool(n_commit.any()):
            logits = denoise(x, attention_mask, position_ids, None if hooked else where)
            nfe += 1
            if logits_hook is not None:
                logits = logits_hook(step, x, logits)
            uniforms = row_uniforms(config.seed, rows, step, lengths, x.shape[1]).to(x.device)
            x = commit(x, where, logits[where] if hooked else logits, n_commit, uniforms, config)
        if tokens_hook is not None:
            x = tokens_hook(step, x, logits)
        if history is not None:
            history.append(x.clone())
    return SampleOutput(x, nfe, history)


def plan_steps(length: int, config: SamplingConfig):
    """Yield (step, the open columns [L], step within the block, steps of the block).

    A block's columns are all that end with it, so that masks inside the prompt are filled with the first block. If
    `block_length` does not divide `max_new_tokens`, the last block is shorter.
    """
    start, block_length = length - config.max_new_tokens, config.block_length or config.max_new_tokens
    ends = [*range(start + block_length, length, block_length), length]
    step = 0
    for end, block_steps in zip(ends, share_steps(config.steps, len(ends)), strict=True):
        in_block = torch.arange(length) < end
        for position in range(block_steps):
            yield step, in_block, position, block_steps
            step += 1


def row_uniforms(seed: int, rows: Sequence[int], step: int, lengths: Sequence[int], width: int) -> Tensor:
    """[2, B, L] uniforms in [0, 1), for tokens and for positions; right-aligned, so left padding draws nothing."""
    uniforms = np.zeros((2, len(rows), width), dtype=np.float32)
    for row, (name, length) in enumerate(zip(rows, lengths, strict=True)):
        uniforms[:, row, width - length :] = np.random.default_rng((seed, name, step)).random((2, length), np.float32)
    return torch.from_numpy(uniforms)


def commit(
    x: Tensor, where: Tensor, logits: Tensor, n_commit: Tensor, uniforms: Tensor, config: SamplingConfig
) -> Tensor:
    """Fix the surest n_commit[b] tokens of every row b.

    Args:
        x: [B, L] canvas.
        where: [B, L] the N candidates.
        logits: [N, V] at the candidates.
        n_commit: [B].
        uniforms: [2, B, L].
    """
    tokens, confidence = propose(logits, uniforms[0][where], config)
    ranked = torch.full(x.shape, -torch.inf, dtype=torch.double, device=x.device)
    ranked[where] = priority(confidence, uniforms[1][where], config).double()
    proposal = x.masked_scatter(where, tokens)

    k = int(n_commit.max())
    columns = ranked.topk(k, dim=-1).indices  # [B, k]
    stay = torch.zeros_like(where).scatter(1, columns, torch.arange(k, device=x.device) < n_commit[:, None])
    return torch.where(stay, proposal, x)
