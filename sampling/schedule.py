"""Number of tokens that a step commits: by a noise schedule, or by the model's confidence."""

from functools import lru_cache

import numpy as np
import torch

from sampling.config import SamplingConfig


def scheduled(config: SamplingConfig, step: int, steps: int, n_at_start: int, n_masked: int) -> int:
    """Number of positions that step `step` of a block's `steps` commits.

    `linear` (Dream) and `cosine` (MaskGIT, arXiv 2202.04200): going from time t to s, neighbours in
    linspace(1, eps, steps + 1), unmasks a share 1 - γ(s)/γ(t) of the masked positions, rounded down; γ(t) = t, or
    sin(πt/2). `even` (LLaDA, arXiv 2502.09992): the same number at every step, one more at the first
    n_at_start mod steps. The last step commits all.

    Args:
        n_at_start: masked positions when the block began.
        n_masked: masked positions now.
    """
    if step == steps - 1:
        return n_masked
    if config.transfer == "even":
        return min(n_at_start // steps + (step < n_at_start % steps), n_masked)
    gamma = masked_shares(config.transfer, steps, config.eps)
    return int(np.float32(n_masked) * (1 - gamma[step + 1] / gamma[step]))


@lru_cache
def masked_shares(transfer: str, steps: int, eps: float) -> np.ndarray:
    """[steps + 1] γ at the times of the grid, in float32 as published, since products with it are rounded down."""
    t = torch.linspace(1, eps, steps + 1)
    return (torch.sin(torch.pi / 2 * t) if transfer == "cosine" else t).numpy()


def select_adaptive(config: SamplingConfig, order: np.ndarray, p: np.ndarray, entropy: np.ndarray) -> np.ndarray:
    """Candidates that an adaptive transfer commits, at least one.

    `threshold` (Fast-dLLM, arXiv 2505.22618) all with a probability of at least `threshold` · `factor` (ibid.) the n
    likeliest, with the largest n for which (n+1)·(1 - p_(n)) < factor · `entropy_bound` (EB-Sampler, arXiv 2505.24857)
    the first n in order, with the largest n for which Σ H - max H ≤ entropy_bound, a bound on their mutual information.

    KLASS is left out: it compares distributions between steps, and would keep all of them [N, V].

    Args:
        order: [N] candidates by falling priority.
        p: [N] probability of the proposed tokens.
        entropy: [N] nats.
    """
    if config.transfer == "threshold":
        chosen = np.flatnonzero(p >= config.threshold)
        return chosen if len(chosen) else order[:1]
    if config.transfer == "factor":
        order = np.argsort(-p, kind="stable")
        holds = np.arange(2, len(p) + 2) * (1 - p[order]) < config.factor
    else:
        h = entropy[order]
        holds = np.cumsum(h) - np.maximum.accumulate(h) <= config.entropy_bound
    n = int(np.flatnonzero(holds)[-1]) + 1 if holds.any() else 1
    return order[:n]


def share_steps(steps: int, blocks: int) -> list[int]:
    """Number of steps of each block: as even as possible, at least one."""
    return [max(1, steps // blocks + (block < steps % blocks)) for block in range(blocks)]
