"""How many tokens each step of the reverse process commits."""

import torch
from torch import Tensor


def time_grid(step: int, steps: int, eps: float, n_masked: Tensor) -> Tensor:
    """Dream's schedule: going from time t to s unmasks a share 1 - s/t of what is still masked.

    t and s are neighbours in linspace(1, eps, steps + 1); the last step commits everything.

    Args:
        n_masked: [B] positions still masked.

    Returns:
        [B] positions to commit now: int(n_masked·(1 - s/t)).
    """
    if step == steps - 1:
        return n_masked
    t, s = torch.linspace(1, eps, steps + 1, device=n_masked.device)[step : step + 2]
    return (n_masked * (1 - s / t)).long()


def even(step: int, steps: int, n_at_start: Tensor, n_masked: Tensor) -> Tensor:
    """LLaDA's schedule: the same number at every step, one more at the first n_at_start mod steps.

    Args:
        n_at_start: [B] positions masked when the block was opened.
        n_masked: [B] positions still masked.

    Returns:
        [B] positions to commit now.
    """
    if step == steps - 1:
        return n_masked
    return torch.minimum(n_at_start // steps + (step < n_at_start % steps), n_masked)


def share_steps(steps: int, blocks: int) -> list[int]:
    """Steps of each block: as even as possible, at least one."""
    return [max(1, steps // blocks + (block < steps % blocks)) for block in range(blocks)]
