"""Weights of the masked positions in the loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

TIME_REWEIGHTINGS = ("none", "original", "linear", "cart")


def time_weights(t: Tensor, masked: Tensor, attended: Tensor, kind: str, cart_p: float) -> Tensor:
    """Time reweighting of every masked position.

    `none` 1 · `original` 1/t, the ELBO under the linear schedule (arXiv 2406.07524, eq. 10) · `linear` 1-t ·
    `cart` see `cart_weights`.

    Args:
        t: [B, L] times, or [B, 1] for rows with one time.
        masked: [B, L] positions noised in x_t.
        attended: [B, L] bool, False at unattended padding.
        kind: one of TIME_REWEIGHTINGS.
        cart_p: parameter of CART's geometric distribution.

    Returns:
        [B, L] float32, 0 where not masked.
    """
    match kind:
        case "cart":
            weights = cart_weights(attended & ~masked, cart_p)
        case "original":
            weights = 1 / t
        case "linear":
            weights = 1 - t
        case "none":
            weights = torch.ones_like(t)
        case _:
            raise NotImplementedError(f"diffusion.time_reweighting={kind}")
    return weights.float() * masked


def cart_weights(context: Tensor, p: float) -> Tensor:
    """Context-adaptive token-level reweighting (CART, Dream 7B, arXiv 2508.15487).

    w_i = Σ_{j ≠ i, j in context} ½·p·(1-p)^(|i-j|-1): the clean context near i, weighted by distance. Two exponential
    scans, one from each side, take time and memory linear in L.

    Args:
        context: [B, L] bool, positions of clean tokens.
        p: in (0, 1]; at 1 only the two direct neighbours count.

    Returns:
        [B, L] float32.
    """
    clean = context.float()
    left, right = exponential_scan(torch.stack([clean, clean.flip(-1)]), 1 - p)
    return 0.5 * p * (left + right.flip(-1))


def exponential_scan(c: Tensor, q: float, block: int = 128) -> Tensor:
    """y_i = Σ_{j < i} q^(i-1-j)·c_j along the last dimension of c [..., L].

    One matrix product handles all blocks, and one number per row carries the past from block to block. Powers avoid
    logarithms, so that q = 0 is allowed.
    """
    length = c.shape[-1]
    c = F.pad(c, (0, -length % block)).unflatten(-1, (-1, block))  # [..., L/block, block]
    k = torch.arange(block, device=c.device)
    lag = k[:, None] - k - 1
    within = torch.where(lag >= 0, torch.tensor(q, device=c.device) ** lag.clamp(min=0), 0.0)
    decay = torch.tensor(q, device=c.device) ** k

    totals = c @ decay.flip(0)  # [..., L/block] value at the end of each block
    past = [torch.zeros_like(totals[..., 0])]
    for total in totals.unbind(-1)[:-1]:
        past.append(past[-1] * q**block + total)
    y = c @ within.T + torch.stack(past, dim=-1)[..., None] * decay
    return y.flatten(-2)[..., :length]
