"""The reverse process of absorbing-state diffusion: fill masked canvases in a few forwards of the model.

A forward gives logits at the candidate positions. The device proposes a token for each and rates it; the host decides
row by row which tokens to commit. Rows take their own steps: a row skips steps that would commit nothing, leaves the
batch when it is done, and the next row takes its place.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sampling.batch import Denoiser, LogitsProcessor, RowBatch, attention_block_of
from sampling.canvas import Canvas, Tokens, trim
from sampling.config import SamplingConfig
from sampling.events import StepEvent
from sampling.policies import SCHEDULED
from sampling.row_state import Criterion, RowState

LogitsHook = Callable[[int, Tensor, Tensor], Tensor]
OnStep = Callable[[StepEvent], object]
TokensHook = Callable[[int | None, Tensor, Tensor | None], Tensor]


@dataclass
class SampledRow:
    """A row whose canvas is filled."""

    canvas: Canvas
    tokens: list[int]  # [L] the whole row
    response: list[int]  # after the prompt, before the end-of-sequence token
    new_tokens: int  # filled in, up to and including the token that ends the response
    nfe: int  # forwards of the model with this row
    history: list[np.ndarray] | None  # [L] each, after every step

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per forward; prompt and padding do not count."""
        return self.new_tokens / max(self.nfe, 1)

    @classmethod
    def of(cls, row: RowState) -> "SampledRow":
        tokens, start = row.tokens.tolist(), row.canvas.prompt_length
        response = trim(tokens[start:], row.special.eos)
        end = start + len(response) + 1 if row.end is None else row.end
        return cls(row.canvas, tokens, response, int((~row.given[:end]).sum()), row.nfe, row.history)


class Sampler:
    """Fills canvases together, step by step. Canvases may be added and dropped between two steps.

    Args:
        logits_processor: `scores = processor(tokens, scores)` on the canvases [N, L] and logits [N, V] of N candidates,
            such as a `LogitsProcessorList` of Transformers.
        criterion: returns whether a response ends with the last of the given tokens, all of them clean. Called for each
            token that becomes clean, from left to right.
        history: keep the canvas after every step.
    """

    def __init__(
        self,
        model: Denoiser,
        config: SamplingConfig,
        special: Tokens,
        *,
        logits_processor: LogitsProcessor | None = None,
        criterion: Criterion | None = None,
        history: bool = False,
    ):
        self._batch = RowBatch(model, config, special, logits_processor)
        self.config = self._batch.config
        settings = {"criterion": criterion, "history": history, "attention_block": attention_block_of(model)}
        self._new_row = partial(RowState, special=special, **settings)
        self._rows: list[tuple[RowState, OnStep | None]] = []

    def __len__(self) -> int:
        """Number of canvases that are not filled yet."""
        return len(self._rows)

    @property
    def free(self) -> int:
        """How many canvases may be added, for `config.batch_size` at once."""
        return self.config.batch_size - len(self)

    def add(self, canvas: Canvas, on_step: OnStep | None = None, seed: int | None = None) -> None:
        """Add a canvas.

        Args:
            on_step: called after each step of the canvas.
            seed: in place of `config.seed`.
        """
        config = self.config if seed is None else replace(self.config, seed=seed)
        self._rows.append((self._new_row(canvas, config), on_step))

    def drop(self, canvas: Canvas) -> None:
        """Leave a canvas unfilled. One that is filled already, or was never added, changes nothing."""
        self._rows = [each for each in self._rows if each[0].canvas is not canvas]

    @torch.no_grad()
    def step(self) -> list[SampledRow]:
        """Take the next step of each canvas, in one forward. Return those that are filled, which makes room for others.

        Raises:
            FloatingPointError: the model's logits are not finite.
            MemoryError: the batch does not fit; the message says what to lower.
        """
        if active := [each for each in self._rows if each[0].step is not None]:
            self._batch.set_rows([row for row, _ in active])
            for (row, on_step), proposal in zip(active, self._batch.propose(), strict=True):
                step = row.step
                row.commit(*proposal)
                row.advance()
                if on_step is not None:
                    on_step(row.event(step))
        filled = [SampledRow.of(row) for row, _ in self._rows if row.step is None]
        self._rows = [each for each in self._rows if each[0].step is not None]
        return filled


def fill(
    model: Denoiser,
    canvases: Iterable[Canvas],
    config: SamplingConfig,
    special: Tokens,
    *,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Iterator[SampledRow]:
    """Fill canvases, `config.batch_size` at once. Yield each row as soon as it is done.

    Args:
        canvases: read as rows become free.
        on_step: called after each step of each row.
        settings: logits_processor, criterion and history, see `Sampler`.
    """
    waiting, sampler = iter(canvases), Sampler(model, config, special, **settings)
    while True:
        for canvas in itertools.islice(waiting, sampler.free):
            sampler.add(canvas, on_step)
        if not len(sampler):
            return
        yield from sampler.step()


@torch.no_grad()
def fill_with_hooks(
    model: Denoiser,
    x: Tensor,
    canvases: Sequence[Canvas],
    config: SamplingConfig,
    special: Tokens,
    tokens_hook: TokensHook | None,
    logits_hook: LogitsHook | None,
    history: bool = False,
) -> list[SampledRow]:
    """Fill canvases with the hooks of the published code: every row takes every step, with a forward of all logits.

    Rules about the ends of rows do not apply.

    Args:
        x: [B, L] the canvases, right-aligned, with the padding tokens.
        tokens_hook: `x = hook(step, x, logits)` after each step, and once before the first with (None, x, None).
        logits_hook: `logits = hook(step, x, logits)` on all logits [B, L, V] before tokens are drawn.

    Raises:
        ValueError: a hook returned another shape, or rows need different numbers of steps.
    """

    def call(hook, name: str, step: int | None, logits: Tensor | None, before: Tensor) -> Tensor:
        after = hook(step, x, logits)
        if after.shape != before.shape:
            raise ValueError(f"{name} gave back shape {list(after.shape)} for {list(before.shape)}: it must keep it")
        return after

    if tokens_hook is not None:
        x = call(tokens_hook, "tokens_hook", None, None, x)
    changed = [replace(c, tokens=tokens[-len(c.tokens) :]) for c, tokens in zip(canvases, x.tolist(), strict=True)]
    batch = RowBatch(model, replace(config, cache="none"), special, width=x.shape[1])
    settings = {"history": history, "every_step": True, "attention_block": attention_block_of(model)}
    rows = [RowState(canvas, batch.config, special, **settings) for canvas in changed]
    if len({row.n_steps for row in rows}) > 1:
        raise ValueError("hooks need rows with equally many steps: let all rows have masks in the same blocks")
    batch.set_rows(rows)
    while any(row.step is not None for row in rows):
        step, logits = rows[0].step.number, batch.logits()
        if logits_hook is not None:
            logits = call(logits_hook, "logits_hook", step, logits, logits)
        for i, (row, proposal) in enumerate(zip(rows, batch.propose(logits), strict=True)):
            row.commit(*proposal)
            x[i, -len(row) :] = torch.from_numpy(row.tokens)
        if tokens_hook is not None:
            x = call(tokens_hook, "tokens_hook", step, logits, x)
        for row, tokens in zip(rows, x.tolist(), strict=True):
            row.tokens[:] = tokens[-len(row) :]
            row.advance()
    return [SampledRow.of(row) for row in rows]


@dataclass
class SampleOutput:
    """Sequences, and the cost of each."""

    sequences: Tensor  # [B, L] prompt and response
    nfe: list[int]  # [B] number of function evaluations: forwards of the model with this row
    tokens_per_forward: list[float]  # [B] new tokens up to the end of the response, over nfe
    history: list[Tensor] | None = None  # canvases [B, L] after every step


def sample(
    model: Denoiser,
    input_ids: Tensor,
    config: SamplingConfig,
    special: Tokens,
    attention_mask: Tensor | None = None,
    *,
    row_ids: Sequence[int] | None = None,
    history: bool = False,
    tokens_hook: TokensHook | None = None,
    logits_hook: LogitsHook | None = None,
    **watchers: Any,
) -> SampleOutput:
    """Fill `config.max_new_tokens` masks after each prompt, and masks inside the prompts.

    Args:
        input_ids: [B, P] prompts, left-padded.
        attention_mask: [B, P], 0 at the padding.
        row_ids: numbers of the rows, which key their draws; by default 0 … B-1.
        history: keep the canvas after every step.
        tokens_hook, logits_hook: see `fill_with_hooks`.
        watchers: logits_processor, criterion and on_step, see `fill`.

    Raises:
        ValueError: a zero in the attention mask to the right of a one, or hooks together with watchers, with a
            cache, or with a transfer that gives rows different numbers of steps.
    """
    attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if bool((attended.diff(dim=-1) < 0).any()):
        raise ValueError("attention_mask has padding to the right of tokens: pad prompts on the left")
    x = F.pad(input_ids, (0, config.max_new_tokens), value=special.mask)
    lengths = attended.sum(-1).tolist()
    row_ids = range(len(x)) if row_ids is None else row_ids
    canvases = [
        Canvas(row[len(row) - length - config.max_new_tokens :], length, row_id)
        for row, length, row_id in zip(x.tolist(), lengths, row_ids, strict=True)
    ]
    if tokens_hook is not None or logits_hook is not None:
        _check_hooks(config, watchers)
        filled = fill_with_hooks(model, x.clone(), canvases, config, special, tokens_hook, logits_hook, history)
    else:
        places = {id(canvas): i for i, canvas in enumerate(canvases)}
        filled = fill(model, canvases, config, special, history=history, **watchers)
        filled = sorted(filled, key=lambda row: places[id(row.canvas)])

    def whole(rows: Iterable[Sequence[int] | np.ndarray]) -> Tensor:
        """[B, L] rows with their padding."""
        filled_in = x.clone()
        for i, tokens in enumerate(rows):
            filled_in[i, -len(tokens) :] = torch.as_tensor(tokens)
        return filled_in

    steps = max(len(row.history) for row in filled) if history else 0
    return SampleOutput(
        whole(row.tokens for row in filled),
        [row.nfe for row in filled],
        [row.tokens_per_forward for row in filled],
        [whole(row.history[min(i, len(row.history) - 1)] for row in filled) for i in range(steps)] if history else None,
    )


def _check_hooks(config: SamplingConfig, watchers: dict[str, Any]) -> None:
    if others := [name for name, watcher in watchers.items() if watcher is not None]:
        raise ValueError(f"tokens_hook and logits_hook go without {', '.join(others)}: leave it out")
    if config.cache not in ("auto", "none"):
        raise ValueError(f"sampling.cache={config.cache}: hooks see all logits, set sampling.cache=none")
    if config.adaptive:
        raise ValueError(f"sampling.transfer={config.transfer}: hooks need one of {', '.join(SCHEDULED)}")
