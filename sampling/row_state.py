"""State of one canvas between two steps: its tokens, its next step, its history."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from sampling.canvas import Canvas, Tokens
from sampling.confidence import gumbel, priority
from sampling.config import SamplingConfig
from sampling.events import StepEvent
from sampling.schedule import masked_shares, scheduled, select_adaptive, share_steps

POSITIONS = 1  # use of draws, beside that for tokens
Criterion = Callable[[np.ndarray], bool]  # whether a row ends with the last of these clean tokens [N]


@dataclass(frozen=True)
class Step:
    """The next step of a row."""

    number: int  # of the row's steps, from 0
    start: int  # first position of the block
    end: int  # position after the block; every mask before it is a candidate
    first: bool  # the first forward of the block
    n_commit: int | None  # tokens to commit; None: an adaptive transfer decides
    n_remask: int = 0


class RowState:
    """State of one row, on the host: its decisions cost microseconds and do not depend on its batch.

    Attributes:
        tokens: [L] the canvas.
        given: [L] bool, positions that were not masked at the start.
        step: the next step; None when the row is done.
        committed, remasked: positions that the last step committed and masked again.
        end: position after the response, if a rule about ends found it.
        nfe: forwards of the model so far.
        history: the canvas after every step, or None.
        final: positions before it are final in the cache of a model that attends by blocks.
    """

    def __init__(
        self,
        canvas: Canvas,
        config: SamplingConfig,
        special: Tokens,
        criterion: Criterion | None = None,
        history: bool = False,
        every_step: bool = False,
        attention_block: int | None = None,
    ):
        self.canvas, self.config, self.special, self.attention_block = canvas, config, special, attention_block
        self.criterion, self.every_step = criterion, every_step
        self.tokens = np.array(canvas.tokens, dtype=np.int64)
        self.given = self.tokens != special.mask
        self.commit_prob = np.zeros(len(self))  # probability of each token when it was committed
        self.commit_entropy = np.zeros(len(self))  # nats, likewise
        self.committed = self.remasked = np.empty(0, dtype=np.int64)
        self.history: list[np.ndarray] | None = [] if history else None
        self.nfe = self.since_refresh = self.final = 0
        self.end: int | None = None
        self.checked = canvas.prompt_length  # no end of the response before this position
        self._steps = self._plan()
        self.step = next(self._steps, None)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def open_block(self) -> tuple[int, int]:
        """Start and end of the block of attention that the next step fills; the whole row without such blocks."""
        size = self.attention_block or len(self)
        start = (self.step.end - 1) // size * size
        return start, min(start + size, len(self))

    def masked(self, end: int | None = None) -> np.ndarray:
        """Positions before `end` that are masked."""
        return (self.tokens[:end] == self.special.mask).nonzero()[0]

    def _blocks(self) -> list[tuple[int, int]]:
        """Start and end of each block with masks. Without attention by blocks, those in the prompt are of the first.

        If `block_length` does not divide the response, the last block is shorter. Blocks begin after the prompt; those
        of a model that attends by blocks at multiples of their length.
        """
        length = self.config.block_length or len(self)
        masked = self.masked()
        first = min([self.canvas.prompt_length, *masked[:1]])
        start = self.canvas.prompt_length if self.attention_block is None else first // length * length
        ends = [*range(start + length, len(self), length), len(self)]
        blocks = zip([first, *ends[:-1]], ends, strict=True)
        return [(start, end) for start, end in blocks if ((start <= masked) & (masked < end)).any()]

    @property
    def n_steps(self) -> int:
        """Number of steps of a scheduled transfer, with those that change nothing."""
        return sum(steps for _, steps in self._steps_of_blocks())

    def _steps_of_blocks(self) -> list[tuple[tuple[int, int], int]]:
        """Each block, and its number of steps if the transfer is scheduled."""
        blocks, masked = self._blocks(), self.tokens == self.special.mask
        counts = [int(masked[start:end].sum()) for start, end in blocks]
        steps = counts if self.config.steps is None else share_steps(self.config.steps, counts)
        return list(zip(blocks, steps, strict=True))

    def _plan(self) -> Iterator[Step]:
        """Yield steps lazily: each depends on the tokens after the one before. Leave out steps that change nothing."""
        config, number = self.config, 0
        schedule = config
        if config.steps is None and self.attention_block is not None:
            schedule = replace(config, transfer="even")  # others round down, and commit the rest at each block's end
        for (start, end), block_steps in self._steps_of_blocks():
            n_at_start, first = len(self.masked(end)), True
            if config.adaptive:
                while len(self.masked(end)):
                    yield Step(number, start, end, first, None)
                    self._record()
                    number, first = number + 1, False
                continue
            for step in range(block_steps):
                n_masked = len(self.masked(end))
                n_commit = scheduled(schedule, step, block_steps, n_at_start, n_masked)
                n_remask = self._n_remask(step, block_steps, start, end, n_masked - n_commit)
                if n_commit or n_remask or self.every_step:
                    yield Step(number, start, end, first, n_commit + n_remask, n_remask)
                    first = False
                self._record()
                number += 1

    def _n_remask(self, step: int, steps: int, start: int, end: int, left: int) -> int:
        """Number of tokens to mask again. The step commits as many more, so that the schedule holds.

        ReMDM-cap (arXiv 2503.00307) masks each token again with probability σ = min(remask, (1 - α_s)/α_t), α = 1 - γ.
        The number is the expected one, rounded down.
        """
        if not self.config.remask or step in (0, steps - 1):
            return 0
        gamma = masked_shares(self.config.transfer, steps, self.config.eps)
        sigma = min(self.config.remask, float(gamma[step + 1] / (1 - gamma[step])))
        return min(int(sigma * len(self._committed(start, end))), left)

    def _committed(self, start: int, end: int) -> np.ndarray:
        """Committed positions that a step of the block may mask again; of attention by blocks, those of the block."""
        start = 0 if self.attention_block is None else start
        return start + np.flatnonzero(~self.given[start:end] & (self.tokens[start:end] != self.special.mask))

    def _record(self) -> None:
        if self.history is not None:
            self.history.append(self.tokens.copy())

    def uniforms(self, *use: int) -> np.ndarray:
        """[L] draws in [0, 1) for a use in this step. Those of a position do not depend on L."""
        key = self.config.seed, self.canvas.row_id, self.step.number, *use
        return np.random.default_rng(key).random(len(self))

    def commit(self, tokens: np.ndarray, confidence: np.ndarray, p: np.ndarray, entropy: np.ndarray) -> None:
        """Commit the best of the proposed tokens, and mask others again with `sampling.remask`. Call `advance` next.

        With `eos_confidence=suppress` proposed end-of-sequence tokens have confidence -inf (arXiv 2502.09992, B.4). An
        adaptive transfer, which reads probabilities, chooses among the other tokens while any is left.

        Args:
            tokens: [N] proposed tokens of the masked positions before `step.end`.
            confidence, p, entropy: [N], see `Proposal`.
        """
        config, step, columns = self.config, self.step, self.masked(self.step.end)
        if config.eos_confidence == "suppress":
            ends = np.isin(tokens, self.special.eos)
            confidence = np.where(ends, -np.inf, confidence)
            if step.n_commit is None and not ends.all():
                ratings = columns, tokens, confidence, p, entropy
                columns, tokens, confidence, p, entropy = (rating[~ends] for rating in ratings)
        random = config.order_temp > 0 or step.n_remask
        draws = self.uniforms(POSITIONS) if random else None
        order = np.argsort(-priority(confidence, None if draws is None else draws[columns], config), kind="stable")
        chosen = select_adaptive(config, order, p, entropy) if step.n_commit is None else order[: step.n_commit]

        self.remasked = self._least_probable(step, draws) if step.n_remask else columns[:0]
        self.tokens[self.remasked] = self.special.mask
        self.committed = columns[chosen]
        self.tokens[self.committed] = tokens[chosen]
        self.commit_prob[self.committed] = p[chosen]
        self.commit_entropy[self.committed] = entropy[chosen]

    def _least_probable(self, step: Step, draws: np.ndarray) -> np.ndarray:
        """Positions to mask again, drawn without replacement with weights softmax(-commit_prob), as in ReMDM-conf."""
        committed = self._committed(step.start, step.end)
        order = np.argsort(self.commit_prob[committed] - gumbel(draws[committed]), kind="stable")
        return committed[order[: step.n_remask]]

    def event(self, step: Step) -> StepEvent:
        """Event of a step after `commit` and `advance`."""
        return StepEvent(
            row_id=self.canvas.row_id,
            step=step.number,
            tokens=self.tokens.copy(),
            masked=self.tokens == self.special.mask,
            prompt_length=self.canvas.prompt_length,
            committed=self.committed,
            probs=self.commit_prob[self.committed],
            entropies=self.commit_entropy[self.committed] if self.config.uses_entropy else None,
            remasked=self.remasked,
            nfe=self.nfe,
            end=self.end,
        )

    def advance(self) -> None:
        """Go to the next step that needs a forward. End the row if its response is complete."""
        self.step = next(self._steps, None)
        if self.every_step:
            return
        masked = self.masked()
        clean = masked[0] if len(masked) else len(self)
        if self.config.remask and self.step is not None:  # clean tokens may be masked again: all, or those of the block
            clean = min(clean, 0 if self.attention_block is None else self.step.start)
        for end in range(self.checked + 1, clean + 1):
            if self._ends(self.tokens[:end]):
                self.step, self.end = None, end
                rest = np.flatnonzero(~self.given[end:]) + end
                self.tokens[rest] = self.special.eos[0] if self.special.eos else self.special.mask
                if self.history:
                    self.history[-1] = self.tokens.copy()
                return
        self.checked = max(self.checked, clean)

    def _ends(self, tokens: np.ndarray) -> bool:
        """Whether the response ends with the last of the tokens [N]."""
        if self.config.stop_at_eos and tokens[-1] in self.special.eos:
            return True
        response = tokens[self.canvas.prompt_length :]
        if any(len(stop) <= len(response) and (response[-len(stop) :] == stop).all() for stop in self.special.stop):
            return True
        if self.special.is_complete is not None and self.special.is_complete(response):
            return True
        return self.criterion is not None and self.criterion(tokens)
