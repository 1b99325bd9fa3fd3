"""Remasking policies: which masked positions a step commits first, and how many.

Each table lists the choices of a setting and handles them: a new entry is a new choice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """Distributions at N candidates: exp / total."""

    exp: Tensor  # [N, K] exp(logit - highest logit); may be overwritten
    total: Tensor  # [N] Σ exp
    best: Tensor  # [N] index of the highest logit, whose exp is 1
    p: Tensor  # [N] probability of the proposed token
    entropy: Tensor | None  # [N] nats; None unless `sampling.alg` is in USE_ENTROPY


def equal(softmax: Softmax) -> Tensor:
    """The same confidence at all candidates."""
    return torch.zeros_like(softmax.p)


def margin(softmax: Softmax) -> Tensor:
    """Probability of the most likely token minus that of the second."""
    second = softmax.exp.scatter_(-1, softmax.best[:, None], 0).amax(-1)
    return (1 - second) / softmax.total


# sampling.alg: the confidence [N] of candidates; the highest are committed first, equal ones from left to right.
ALGS: dict[str, Callable[[Softmax], Tensor]] = {
    "origin": equal,  # arXiv 2107.03006
    "maskgit_plus": lambda softmax: softmax.p,  # arXiv 2202.04200
    "topk_margin": margin,  # arXiv 2502.06768
    "entropy": lambda softmax: -softmax.entropy,
    "left_to_right": equal,
}
ORDER_TEMP = {"origin": 1.0, "left_to_right": 0.0}  # in place of `sampling.alg_temp`: at random, or never

# sampling.confidence: the logits that rate a token, and `ids`, or None if their columns are all tokens in order.
# Arguments: the model's logits [N, V], the logits [N, K] that tokens are drawn from, and the `ids` of these, or None.
CONFIDENCES: dict[str, Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]] = {
    "unscaled": lambda logits, drawn, ids: (logits, None),
    "scaled": lambda logits, drawn, ids: (drawn, ids),
}

# sampling.transfer, as scheduled: γ(t), the share of the positions that is masked at time t.
SCHEDULED: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda t: t,  # Dream
    "cosine": lambda t: torch.sin(torch.pi / 2 * t),  # MaskGIT, arXiv 2202.04200
    "even": lambda t: t,  # LLaDA, arXiv 2502.09992; `scheduled` has its counts
}


def threshold(order: np.ndarray, p: np.ndarray, entropy: np.ndarray | None, least: float) -> np.ndarray:
    """All with a probability of at least `least` (Fast-dLLM, arXiv 2505.22618)."""
    return np.flatnonzero(p >= least)


def factor(order: np.ndarray, p: np.ndarray, entropy: np.ndarray | None, bound: float) -> np.ndarray:
    """The n likeliest, with the largest n for which (n+1)·(1 - p_(n)) < bound (Fast-dLLM)."""
    order = np.argsort(-p, kind="stable")
    return _longest(order, np.arange(2, len(p) + 2) * (1 - p[order]) < bound)


def entropy_bound(order: np.ndarray, p: np.ndarray, entropy: np.ndarray, bound: float) -> np.ndarray:
    """The first n in order, with the largest n for which Σ H - max H ≤ bound (EB-Sampler, arXiv 2505.24857).

    The sum bounds the mutual information of the n tokens.
    """
    h = entropy[order]
    return _longest(order, np.cumsum(h) - np.maximum.accumulate(h) <= bound)


def _longest(order: np.ndarray, holds: np.ndarray) -> np.ndarray:
    n = int(np.flatnonzero(holds)[-1]) + 1 if holds.any() else 1
    return order[:n]


# sampling.transfer, by confidence: the candidates to commit; if none, the first of `order` is. Arguments: candidates by
# falling priority [N], probabilities of their tokens [N], entropies [N] in nats (None unless the transfer is in
# USE_ENTROPY), and `SamplingConfig.bound`.
# KLASS is left out: it compares distributions between steps, and would keep all of them [N, V].
ADAPTIVE: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray | None, float], np.ndarray]] = {
    "threshold": threshold,
    "factor": factor,
    "entropy_bound": entropy_bound,
}
USE_ENTROPY = {"entropy", "entropy_bound"}  # of ALGS and ADAPTIVE: entropies cost a pass over the logits
