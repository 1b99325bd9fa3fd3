"""Propose a token for each masked position, with the confidence of the model.

Confidence is a property of the model's distribution, temperature of the draw. Confidence after temperature ties at 1
everywhere as the temperature goes to 0, and positions are then filled from left to right.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sampling.config import SamplingConfig

NUCLEUS = 64  # most likely tokens that are searched first for the nucleus


class Proposal(NamedTuple):
    """Tokens for N candidate positions, rated."""

    tokens: Tensor  # [N]
    confidence: Tensor  # [N] float32, by `alg`; the highest are committed first
    p: Tensor  # [N] float32, probability of the token
    entropy: Tensor  # [N] float32, nats; 0 if neither `alg` nor `transfer` uses it


def propose(logits: Tensor, uniforms: Tensor | None, config: SamplingConfig) -> Proposal:
    """Draw a token for each candidate and rate it.

    Args:
        logits: [N, V], overwritten.
        uniforms: [N] draws in [0, 1); None at temperature 0.
    """
    logits = logits.float()
    if config.temperature == 0 and config.confidence == "unscaled":
        return _rate(logits, None, None, config)
    values, ids = support(logits, config)
    place = values.argmax(-1) if uniforms is None else inverse_cdf(values, uniforms)
    if config.confidence == "scaled":
        return _rate(values, place, ids, config)
    return _rate(logits, place if ids is None else ids.gather(-1, place[:, None]).squeeze(-1), None, config)


def support(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """Apply temperature, then top-p, then top-k, in the published order.

    The nucleus holds each token whose more likely tokens have a total probability of at most `top_p`. The search takes
    the k most likely tokens, with larger k until they contain the nucleus, and never sorts a vocabulary.

    Args:
        logits: [N, V].

    Returns:
        Logits [N, K], -inf at tokens that must not be drawn, and their tokens [N, K], or None for all V in order.
    """
    if config.temperature > 0:
        logits = logits / config.temperature
    nucleus = config.top_p is not None and config.top_p < 1
    if not nucleus and config.top_k is None:
        return logits, None
    size = logits.shape[-1]
    k = min(config.top_k or NUCLEUS, size)
    log_total = logits.logsumexp(-1, keepdim=True) if nucleus else None
    while True:
        values, ids = logits.topk(k, dim=-1)
        if not nucleus:
            return values, ids
        p = (values - log_total).exp()
        counted = p.cumsum(-1)
        if config.top_k is not None or k == size or bool((counted[:, -1] > config.top_p).all()):
            return values.masked_fill(counted - p > config.top_p, -torch.inf), ids
        k = min(4 * k, size)


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from softmax(logits [N, K]) with one uniform [N] a row, in float64: a large vocabulary has a long tail."""
    cdf = (logits - logits.amax(-1, keepdim=True)).exp().double().cumsum(-1)
    return torch.searchsorted(cdf, (uniforms.double() * cdf[:, -1])[:, None], right=True).squeeze(-1)


def _rate(logits: Tensor, place: Tensor | None, ids: Tensor | None, config: SamplingConfig) -> Proposal:
    """Rate tokens in few passes over the logits, which are overwritten.

    `maskgit_plus` (arXiv 2202.04200) p(token) · `topk_margin` (arXiv 2502.06768) p of the first minus p of the second ·
    `entropy` Σ p log p, the negative entropy · `origin` (arXiv 2107.03006) and `left_to_right` a constant: the order is
    random, or that of the positions.

    Args:
        logits: [N, K].
        place: [N] index of the drawn token; None takes the most likely.
        ids: [N, K] tokens; None for all in order.
    """
    top, best = logits.max(-1)
    place = best if place is None else place
    logits.sub_(top[:, None])
    at_place = logits.gather(-1, place[:, None]).squeeze(-1)
    if config.uses_entropy:
        exp = logits.clamp_(min=-1e4).exp()  # a finite floor: 0·-inf is no number
        total = exp.sum(-1)
        entropy = total.log() - logits.mul_(exp).sum(-1) / total
    else:
        exp = logits.exp_()
        total = exp.sum(-1)
        entropy = torch.zeros_like(total)
    p = at_place.exp() / total
    match config.alg:
        case "maskgit_plus":
            confidence = p
        case "topk_margin":
            first, second = F.pad(exp, (0, 1)).topk(2, dim=-1).values.unbind(-1)  # top_k=1 leaves no second
            confidence = (first - second) / total
        case "entropy":
            confidence = -entropy
        case _:
            confidence = torch.zeros_like(p)
    tokens = place if ids is None else ids.gather(-1, place[:, None]).squeeze(-1)
    return Proposal(tokens, confidence, p, entropy)


def priority(confidence: np.ndarray, uniforms: np.ndarray | None, config: SamplingConfig) -> np.ndarray:
    """[N] priorities; the highest are committed first.

    With `alg_temp` above 0 the k highest of confidence/alg_temp + Gumbel noise are k positions drawn without
    replacement from softmax(confidence/alg_temp) (arXiv 1903.06059). `origin` is the same with equal confidences.

    Args:
        confidence: [N].
        uniforms: [N] draws in [0, 1); unused if confidence alone decides.
    """
    if config.alg == "origin":
        return gumbel(uniforms)
    if config.alg_temp == 0 or config.alg == "left_to_right":
        return confidence
    return confidence / config.alg_temp + gumbel(uniforms)


def gumbel(uniforms: np.ndarray) -> np.ndarray:
    """Gumbel noise from uniforms in [0, 1)."""
    return -np.log(-np.log(uniforms.astype(np.float64).clip(1e-12, 1 - 1e-12)))
