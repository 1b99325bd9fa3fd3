"""Number of tokens that a step commits: by a noise schedule, or by the model's confidence."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from sampling.config import SamplingConfig
from sampling.policies import ADAPTIVE, SCHEDULED, USE_ENTROPY


def scheduled(config: SamplingConfig, step: int, steps: int, n_at_start: int, n_masked: int) -> int:
    """Number of positions that step `step` of a block's `steps` commits.

    Going from time t to s, neighbours in linspace(1, eps, steps + 1), unmasks a share 1 - γ(s)/γ(t) of the masked
    positions, rounded down. `even` (LLaDA, arXiv 2502.09992) unmasks the same number at every step, one more at the
    first n_at_start mod steps. The last step commits all.

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
    return SCHEDULED[transfer](t).numpy()


def select_adaptive(config: SamplingConfig, order: np.ndarray, p: np.ndarray, entropy: np.ndarray) -> np.ndarray:
    """Candidates that an adaptive transfer commits, at least one.

    Args:
        order: [N] candidates by falling priority.
        p: [N] probability of the proposed tokens.
        entropy: [N] nats.
    """
    chosen = ADAPTIVE[config.transfer](order, p, entropy if config.transfer in USE_ENTROPY else None, config.bound)
    return chosen if len(chosen) else order[:1]


def share_steps(steps: int, masked: Sequence[int]) -> list[int]:
    """Number of steps of each block: in proportion to its masked positions, at least one."""
    total = sum(masked) or 1
    shares = [steps * n // total for n in masked]
    by_remainder = sorted(range(len(masked)), key=lambda block: -(steps * masked[block] % total))
    for block in by_remainder[: steps - sum(shares)]:
        shares[block] += 1
    return [max(1, share) for share in shares]
