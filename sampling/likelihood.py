"""Lower bound on the log-likelihood of tokens, by Monte Carlo.

A masked diffusion model gives n tokens of a row, S, with the rest of the row known, at least the log-likelihood

    E_{t ~ U(0, 1]} E_{x_t} [1/t · Σ_{i masked} log p(x_i | x_t)]    S masked with probability t, LLaDA, eq. 5
  = E_{l ~ U{1 … n}} E_{x_l} [n/l · Σ_{i masked} log p(x_i | x_l)]   exactly l tokens of S masked, LLaDA, eq. 6

(arXiv 2502.09992). Both equal the sum over the masks M of S of B(m, n-m+1) · Σ_{i in M} log p(x_i | x_M), m = |M|,
because ∫ t^(m-1) (1-t)^(n-m) dt = B(m, n-m+1) = 1/(m · C(n, m)). The second form is sampled: each draw is n times a
mean of log-probabilities. The first has an infinite variance, since its second moment contains ∫ n/t dt.

A model that attends by blocks gives log p as the sum over its blocks, each given those before it, so a bound is one
within blocks alone. With blocks of one token it is the likelihood of an autoregressive model, exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import torch
import torch.nn.functional as F

from sampling.batch import Denoiser, attention_block_of, check_numbers, positions_at_once
from sampling.canvas import Tokens, count_positions, left_pad
from sampling.transfer import to_device
from sampling.visibility import Visibility


@dataclass(frozen=True)
class Score:
    """Estimate of a lower bound on the log-likelihood of tokens."""

    mean: float  # nats, the sum over all tokens
    standard_error: float  # of `mean`, nats; 0 where the bound is exact
    tokens: int  # number of scored tokens
    nfe: int  # masks of them, each forwarded once

    @property
    def per_token(self) -> float:
        """Nats a token."""
        return self.mean / self.tokens

    @classmethod
    def total(cls, scores: Sequence["Score"]) -> "Score":
        """Score of parts that are scored independently, each given those before it."""
        error = float(np.linalg.norm([score.standard_error for score in scores]))
        return cls(
            sum(score.mean for score in scores),
            error,
            sum(score.tokens for score in scores),
            sum(score.nfe for score in scores),
        )


@dataclass(frozen=True)
class Choice:
    """Scores of several responses to one prompt. Of equal scores the first is best."""

    scores: list[Score]

    @property
    def best(self) -> int:
        """Index of the likeliest response. Longer responses multiply more probabilities."""
        return max(range(len(self.scores)), key=lambda i: self.scores[i].mean)

    @property
    def best_per_token(self) -> int:
        """Index of the response with the most nats per token."""
        return max(range(len(self.scores)), key=lambda i: self.scores[i].per_token)


def score(
    model: Denoiser,
    prompt: Sequence[int],
    response: Sequence[int],
    special: Tokens,
    samples: int = 64,
    seed: int = 0,
    batch_size: int = 32,
) -> Score:
    """Bound on log p(response | prompt). Arguments and errors are those of `score_positions`."""
    return choose(model, prompt, [response], special, samples, seed, batch_size).scores[0]


def choose(
    model: Denoiser,
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    special: Tokens,
    samples: int = 64,
    seed: int = 0,
    batch_size: int = 32,
) -> Choice:
    """Compare responses to a prompt, as multiple choice does. Arguments are those of `score_positions`.

    Raises:
        ValueError: no responses, or see `score_positions`, whose rows are the responses.
    """
    if not responses:
        raise ValueError("responses is empty: give at least one to choose from")
    rows = [([*prompt, *response], range(len(prompt), len(prompt) + len(response))) for response in responses]
    return Choice(score_positions(model, rows, special, samples, seed, batch_size))


@torch.no_grad()
def score_positions(
    model: Denoiser,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    special: Tokens,
    samples: int = 64,
    seed: int = 0,
    batch_size: int = 32,
) -> list[Score]:
    """Bound on the log-likelihood of the tokens at some positions, given all other tokens of their row.

    Log-probabilities come from the model's own distribution over the whole vocabulary, as in the training loss. Rows
    with n ≤ log2(samples + 1) positions are scored exactly: each of their 2^n - 1 masks is forwarded once.

    Args:
        rows: tokens [L], which fit the model's context, and the n positions to score. Masks at other positions stay.
        samples: masks drawn for a row; even, because pairs of draws give the standard error (see `_Masks`).
        seed: a row's masks depend on (seed, samples, n) alone, those of a block on its place too. The first positions
            of all rows share their noise, so that differences between alternatives are less noisy than their scores.
        batch_size: masks forwarded together.

    Raises:
        ValueError: samples, batch_size or seed out of range, or a row without positions, with positions that repeat or
            lie outside it, or with a mask at one of them.
        FloatingPointError: the logits are not finite.
    """
    if samples < 2 or samples % 2:
        raise ValueError(f"samples={samples}: must be even and at least 2, the standard error is made of pairs")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed}: must not be negative")
    rows = [_checked(number, tokens, at, special.mask) for number, (tokens, at) in enumerate(rows)]
    parts = [_by_blocks(*row, attention_block_of(model)) for row in rows]
    rows = [part for parts_of_row in parts for part in parts_of_row]
    keys = [[seed, place] if place else seed for parts_of_row in parts for place in range(len(parts_of_row))]
    draws = [
        _every(len(at)) if 2 ** len(at) - 1 <= samples else _drawn(len(at), samples, key)
        for (_, at), key in zip(rows, keys, strict=True)
    ]
    noised = [(tokens, at[m]) for (tokens, at), draw in zip(rows, draws, strict=True) for m in draw.masks]
    log_p = np.empty(len(noised))
    for start in range(0, len(noised), batch_size):
        some = slice(start, start + batch_size)
        log_p[some] = _log_p(model, *zip(*noised[some], strict=True), special.mask)
    ends = np.cumsum([len(draw.masks) for draw in draws])
    scores = iter([draw.bound(log_p[end - len(draw.masks) : end]) for draw, end in zip(draws, ends, strict=True)])
    return [Score.total([next(scores) for _ in parts_of_row]) for parts_of_row in parts]


def _by_blocks(tokens: np.ndarray, at: np.ndarray, size: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """The positions of each block of attention, with the tokens that it sees."""
    if size is None:
        return [(tokens, at)]
    blocks = at // size
    return [(tokens[: (block + 1) * size], at[blocks == block]) for block in np.unique(blocks)]


def _checked(number: int, tokens: Sequence[int], at: Sequence[int], mask: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [L] and positions [n] of a row as arrays."""
    tokens, at = np.array(tokens, dtype=np.int64), np.array(at, dtype=np.int64)
    if not len(at):
        raise ValueError(f"row {number} has no tokens to score: give at least one")
    if at.min() < 0 or at.max() >= len(tokens) or len(np.unique(at)) < len(at):
        raise ValueError(f"row {number}: positions {at.tolist()} must differ and lie in 0 … {len(tokens) - 1}")
    if mask in tokens[at]:
        place = at[tokens[at] == mask][0]
        raise ValueError(f"row {number} has the mask token {mask} at position {place}: score clean tokens only")
    return tokens, at


@dataclass(frozen=True)
class _Masks:
    """Masks of n positions, and the weight of each in the bound."""

    masks: np.ndarray  # [K, n] bool
    weights: np.ndarray  # [K]
    exact: bool  # all masks; else pairs of independent draws, each pair from its own stratum

    def bound(self, log_p: np.ndarray) -> Score:
        """The bound, from Σ log p [K] of the tokens under each mask.

        Σ (a - b)² over the K/2 pairs estimates the variance of the sum: on average (a - b)² is Var(a + b), whatever the
        mean of the stratum. The spread of all draws would count differences between strata too.
        """
        terms = self.weights * log_p
        error = 0.0 if self.exact else float(np.linalg.norm(terms[0::2] - terms[1::2]))
        return Score(float(terms.sum()), error, self.masks.shape[1], len(self.masks))


def _every(n: int) -> _Masks:
    """All 2^n - 1 masks that are not empty."""
    masks = (np.arange(1, 2**n)[:, None] >> np.arange(n) & 1).astype(bool)
    return _Masks(masks, np.array([1 / (m * comb(n, m)) for m in masks.sum(1).tolist()]), exact=True)


def _drawn(n: int, samples: int, seed: int | list[int]) -> _Masks:
    """Masks of the l = ⌈t·n⌉ positions with the lowest noise. Draws 2h and 2h+1 have t in (2h, 2h+2]/samples."""
    noise = np.random.default_rng(seed).random((1 + n, samples))
    t = (np.arange(samples) // 2 + 1 - noise[0]) / (samples // 2)
    n_masked = np.ceil(t * n)
    masks = noise[1:].argsort(0, kind="stable").argsort(0) < n_masked
    return _Masks(masks.T, n / n_masked / samples, exact=False)


def _log_p(model: Denoiser, rows: Sequence[np.ndarray], masked: Sequence[np.ndarray], mask: int) -> np.ndarray:
    """[b] Σ log p of the tokens at the masked positions of each row [L], masked together."""
    x_0, attention_mask = left_pad(rows, mask)
    pads = [x_0.shape[1] - len(tokens) for tokens in rows]
    row = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(at) for at in masked]))
    column = torch.from_numpy(np.concatenate([at + pad for at, pad in zip(masked, pads, strict=True)]))
    x_t = x_0.index_put((row, column), torch.tensor(mask))
    visibility = Visibility(attended=attention_mask) if any(pads) else Visibility()
    given = x_t, count_positions(attention_mask), x_0[row, column], row, column
    x_t, position_ids, targets, *where = (to_device(tensor, model.device) for tensor in given)
    hidden = model.hidden(x_t, position_ids, visibility, *where)
    at_once = positions_at_once(model)
    parts = zip(hidden.split(at_once), targets.split(at_once), strict=True)
    nll = torch.cat([F.cross_entropy(model.head(h).float(), target, reduction="none") for h, target in parts])
    nll = nll.double().cpu().numpy()
    check_numbers(nll)
    return -np.bincount(row.numpy(), nll, minlength=len(rows))
