"""Forward rows together and propose tokens for their masked positions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sampling.cache import CanvasCache, computed, needs_refresh, refreshed, with_cache
from sampling.canvas import Tokens, count_positions, left_pad
from sampling.confidence import propose
from sampling.config import SamplingConfig
from sampling.row_state import RowState
from sampling.transfer import to_device
from sampling.visibility import Visibility

RATED_AT_ONCE = 2**20  # logits that a CPU rates together: they stay in its cache over several passes

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


class Denoiser(Protocol):
    """A model that gives logits for the tokens under the masks.

    It may have `width_multiple`, `lend_cache`, `hidden_of_step` and `rating`, as `diffllm.DiffLLM` has.
    """

    device: torch.device
    vocab_size: int

    def hidden(
        self,
        x_t: Tensor,
        position_ids: Tensor,
        visibility: Visibility,
        row: Tensor,
        column: Tensor,
        cache: CanvasCache | None = None,
    ) -> Tensor:
        """[N, …] hidden states of N positions, for `head`.

        Args:
            x_t: [B, L] tokens.
            position_ids: [B, L].
            visibility: which positions a position sees; on any device.
            row, column: [N] the positions.
            cache: holds keys and values; compute those of its `columns` only.
        """

    def head(self, hidden: Tensor) -> Tensor:
        """[N, V] logits."""


def positions_at_once(model: Denoiser) -> int:
    """Number of positions whose logits are computed together: 128 MiB in float32 on a CPU, 512 MiB on a GPU.

    Each such part reads the weights of the head once: larger parts are faster and take more memory.
    """
    return max(1, 2 ** (25 if model.device.type == "cpu" else 27) // model.vocab_size)


def attention_block_of(model: Denoiser) -> int | None:
    """Positions of a block of the model's attention; None if every position sees all."""
    return getattr(model, "block_length", None)


def check_numbers(values: np.ndarray) -> None:
    """Refuse what a model with broken weights, or one that overflows, has computed.

    Raises:
        FloatingPointError: one of the values is no number.
    """
    if np.isnan(values).any():
        raise FloatingPointError(
            "the model's logits are not finite: `python -m launch.verify model.path=MODEL` names broken weights; with "
            "sound weights, compute in float32"
        )


class RowBatch:
    """Rows that are forwarded together, aligned at the right.

    A model that attends by blocks sees nothing after the open block of a row. Its rows are aligned at the left, and the
    batch is as wide as the last of their open blocks.

    Args:
        width: forward all of each row, in a batch of this width.
    """

    def __init__(
        self,
        model: Denoiser,
        config: SamplingConfig,
        special: Tokens,
        logits_processor: LogitsProcessor | None = None,
        width: int | None = None,
    ):
        config = with_cache(config, attention_block_of(model))
        self.multiple, self.given_width = getattr(model, "width_multiple", 1), width
        self.grows = attention_block_of(model) is not None and width is None
        self.model, self.config, self.special, self.logits_processor = model, config, special, logits_processor
        self.hidden, self.rating = getattr(model, "hidden_of_step", model.hidden), getattr(model, "rating", None)
        self.rows: list[RowState] = []
        self.needed: list[int] = []  # tokens of each row
        # one for the canvas; with guidance another for the canvas whose given tokens are masked
        lend = getattr(model, "lend_cache", lambda _: CanvasCache())
        self.caches = [lend(self) for _ in range(2 if config.cfg_scale else 1)] if config.cache != "none" else []
        self.at_once = positions_at_once(model)
        self.rated_at_once = max(1, RATED_AT_ONCE // model.vocab_size) if model.device.type == "cpu" else self.at_once
        self.eos = self._to_device(np.array(special.eos, dtype=np.int64))
        # Adaptive transfer must never commit the mask token, or it would loop. Kept blocks must not hold it. Otherwise
        # the published schedules may commit it.
        unmasks = config.adaptive or attention_block_of(model) is not None
        never = (*special.forbidden, special.mask) if unmasks else special.forbidden
        self.never = self._to_device(np.array(never, dtype=np.int64))

    def set_rows(self, rows: Sequence[RowState]) -> None:
        """Replace the rows. Rows that stay keep their cached keys and values."""
        needed = [row.open_block[1] if self.grows else len(row) for row in rows]
        if rows == self.rows and needed == self.needed:
            return
        width = self.given_width or -(-max(needed) // self.multiple) * self.multiple
        places = {id(row): i for i, row in enumerate(self.rows)}
        for cache in self.caches:
            cache.arrange([places.get(id(row)) for row in rows], width, at_left=self.grows)
        self.rows, self.needed, self.width = list(rows), needed, width
        lengths = np.array(needed)
        self.pads = np.zeros_like(lengths) if self.grows else width - lengths
        self.starts = self._to_device(self.pads + [row.canvas.prompt_length for row in rows])
        column, first = np.arange(width), self.pads[:, None]
        attended = torch.from_numpy((column >= first) & (column < first + lengths[:, None]))
        self.position_ids = to_device(count_positions(attended), self.model.device)
        self.visibility = Visibility() if attended.all() else Visibility(attended=attended)

    @contextmanager
    def _naming_the_batch(self) -> Iterator[None]:
        """Let an error of memory name what to lower.

        Raises:
            MemoryError: the block ran out of memory.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            lower = "sampling.batch_size" if len(self.rows) > 1 else "sampling.max_new_tokens"
            raise MemoryError(
                f"out of memory with {len(self.rows)}×{self.width} tokens; lower {lower} ({str(error).splitlines()[0]})"
            ) from error

    def propose(self, logits: Tensor | None = None) -> list[tuple[np.ndarray, ...]]:
        """Tokens, confidence, p and entropy [n] at the n candidates of each row.

        Args:
            logits: [B, L, V]; None forwards the model, at the candidates only.
        """
        candidates = [row.masked(row.step.end) for row in self.rows]
        counts = [len(columns) for columns in candidates]
        row = np.repeat(np.arange(len(self.rows)), counts)
        column = np.concatenate(candidates) + np.repeat(self.pads, counts)
        uniforms = None
        if self.config.temperature > 0:
            drawn = [state.uniforms()[columns] for state, columns in zip(self.rows, candidates, strict=True)]
            uniforms = self._to_device(np.concatenate(drawn))

        with self._naming_the_batch():
            together = self._rate(row, column, uniforms, logits)
        ends = np.cumsum(counts)
        return [
            tuple(column[end - count : end] for column in together) for count, end in zip(counts, ends, strict=True)
        ]

    def _rate(
        self, row: np.ndarray, column: np.ndarray, uniforms: Tensor | None, logits: Tensor | None
    ) -> list[np.ndarray]:
        """Tokens, confidence, p and entropy at N positions.

        Raises:
            FloatingPointError: see `check_numbers`.
        """
        views = self._views()
        where = self._to_device(np.stack([row, column]))
        hidden = self._forward(views, row, column) if logits is None else []
        row, column = where
        canvases = self._canvases() if self.logits_processor is not None else None
        parts = []
        for start in range(0, max(len(row), 1), self.at_once):  # logits of all candidates at once would be gigabytes
            some = slice(start, start + self.at_once)
            part = self._guided(hidden, some) if logits is None else logits[row[some], column[some]]
            part = self._restricted(part, canvases, row[some], column[some]).split(self.rated_at_once)
            draws = [None] * len(part) if uniforms is None else uniforms[some].split(self.rated_at_once)
            proposals = (propose(*piece, self.config, self.rating) for piece in zip(part, draws, strict=True))
            parts += [torch.stack([column.double() for column in proposal]) for proposal in proposals]
        tokens, *ratings = torch.cat(parts, dim=1).cpu().numpy()  # one wait for the GPU; float64 holds them exactly
        check_numbers(ratings[1])
        return [tokens.astype(np.int64), *(rating.astype(np.float32) for rating in ratings)]

    def logits(self) -> Tensor:
        """[B, L, V] of every position."""
        row, column = np.indices((len(self.rows), self.width)).reshape(2, -1)
        with self._naming_the_batch():
            hidden = self._forward(self._views(), row, column)
            return self._guided(hidden, slice(None)).float().unflatten(0, (len(self.rows), self.width))

    def _views(self) -> list[Tensor]:
        """Canvases [B, L]; with guidance also the canvases whose given tokens are masked."""
        x = np.full((2, len(self.rows), self.width), self.special.mask)
        for i, row in enumerate(self.rows):
            tokens, given = row.tokens[: self.needed[i]], row.given[: self.needed[i]]
            x[0, i, self._columns(i)] = tokens
            x[1, i, self._columns(i)] = np.where(given, self.special.mask, tokens)
        return list(self._to_device(x[: 2 if self.config.cfg_scale else 1]))

    def _forward(self, views: list[Tensor], row: np.ndarray, column: np.ndarray) -> list[Tensor]:
        """[N, …] hidden states of each view at N positions."""
        for state in self.rows:
            state.nfe += len(views)
        if not self.caches:
            where = self._to_device(np.stack([row, column]))
            return [self.hidden(x, self.position_ids, self.visibility, *where) for x in views]

        refresh = np.array([needs_refresh(state) for state in self.rows])
        hidden: list[Tensor | None] = [None] * len(views)
        for fresh in (True, False):
            group = np.flatnonzero(refresh == fresh)
            inside = np.isin(row, group)
            if not len(group):
                continue
            rows = self._to_device(group)
            where = self._to_device(np.searchsorted(group, row[inside])), self._to_device(column[inside])
            seen = self.position_ids[rows], self.visibility.rows(torch.from_numpy(group))
            for i, (x, cache) in enumerate(zip(views, self.caches, strict=True)):
                cache.select(rows, self._active(group, fresh))
                part = self.hidden(x[rows], *seen, *where, cache)
                if hidden[i] is None:
                    hidden[i] = part.new_empty(len(row), *part.shape[1:])
                hidden[i][self._to_device(np.flatnonzero(inside))] = part
            for state in (self.rows[i] for i in group):
                state.since_refresh = 1 if fresh else state.since_refresh + 1
                if state.attention_block is not None:
                    state.final = state.open_block[0]
        return hidden

    def _active(self, group: np.ndarray, fresh: bool) -> np.ndarray | None:
        """[b, L] bool, positions that these rows compute, with a refresh or without one; None for all."""
        if fresh and self.rows[0].attention_block is None:
            return None
        active = np.zeros((len(group), self.width), dtype=bool)
        for i, place in enumerate(group):
            chosen = (refreshed if fresh else computed)(self.rows[place])
            active[i, self._columns(place)] = chosen[: self.needed[place]]
        return active

    def _columns(self, place: int) -> slice:
        """Columns of the tokens of a row."""
        return slice(self.pads[place], self.pads[place] + self.needed[place])

    def _guided(self, hidden: list[Tensor], some: slice) -> Tensor:
        """Logits [n, V]; with guidance l_u + (1 + cfg_scale)·(l - l_u), l_u with the prompt masked (LLaDA, eq. 16)."""
        logits, *unconditional = (self.model.head(states[some]) for states in hidden)
        for without in unconditional:
            without = without.float()
            logits = without + (self.config.cfg_scale + 1) * (logits - without)
        return logits

    def _canvases(self) -> Tensor:
        """[B, L] all tokens of the rows, aligned at the right."""
        return self._to_device(left_pad([row.tokens for row in self.rows], self.special.mask)[0].numpy())

    def _restricted(self, logits: Tensor, canvases: Tensor | None, row: Tensor, column: Tensor) -> Tensor:
        """Logits [n, V], overwritten: `logits_processor`, then the settings that penalise or forbid tokens."""
        if self.logits_processor is not None or self.config.eos_penalty:
            logits = logits.float()
        if self.logits_processor is not None:
            logits = self.logits_processor(canvases[row], logits)
        if self.config.eos_penalty:
            logits[:, self.eos] -= self.config.eos_penalty
        if self.config.min_new_tokens:
            early = column - self.starts[row] < self.config.min_new_tokens
            logits[:, self.eos] = logits[:, self.eos].masked_fill(early[:, None], -torch.inf)
        return logits.index_fill_(1, self.never, -torch.inf)

    def _to_device(self, array: np.ndarray) -> Tensor:
        """An array on the model's device."""
        return to_device(torch.from_numpy(array), self.model.device)
