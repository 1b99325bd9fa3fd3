"""Propose a token for each masked position, with the confidence of the model.

Confidence is a property of the model's distribution, temperature of the draw. Confidence after temperature ties at 1
everywhere as the temperature goes to 0, and positions are then filled from left to right.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sampling.config import SamplingConfig
from sampling.policies import ALGS, CONFIDENCES, USE_ENTROPY, Softmax

NUCLEUS = 64  # most likely tokens that are searched first for the nucleus


class Proposal(NamedTuple):
    """Tokens for N candidate positions, rated."""

    tokens: Tensor  # [N]
    confidence: Tensor  # [N] float32, by `alg`; the highest are committed first
    p: Tensor  # [N] float32, probability of the token
    entropy: Tensor  # [N] float32, nats; 0 if neither `alg` nor `transfer` uses it


Rating = Callable[[Tensor, Tensor | None, Tensor | None, SamplingConfig], Proposal]


def propose(logits: Tensor, uniforms: Tensor | None, config: SamplingConfig, rating: Rating | None = None) -> Proposal:
    """Draw a token for each candidate and rate it.

    Args:
        logits: [N, V], overwritten.
        uniforms: [N] draws in [0, 1); None at temperature 0.
        rating: in place of `rate`.
    """
    rating = rating or rate
    if config.temperature == 0 and config.confidence == "unscaled":
        return rating(logits, None, None, config)
    logits = logits.float()
    values, ids = support(logits, config)
    place = values.argmax(-1) if uniforms is None else inverse_cdf(values, uniforms)
    rated, rated_ids = CONFIDENCES[config.confidence](logits, values, ids)
    if ids is not None and rated_ids is None:
        place = ids.gather(-1, place[:, None]).squeeze(-1)
    return rating(rated, place, rated_ids, config)


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
    place = torch.searchsorted(cdf, (uniforms.double() * cdf[:, -1])[:, None], right=True).squeeze(-1)
    return place.clamp_(max=logits.shape[1] - 1)  # past the end if a logit is no number


def rate(logits: Tensor, place: Tensor | None, ids: Tensor | None, config: SamplingConfig) -> Proposal:
    """Rate tokens in float32, in few passes over the logits, which are overwritten.

    Args:
        logits: [N, K].
        place: [N] index of the drawn token; None takes the most likely.
        ids: [N, K] tokens; None for all in order.
    """
    logits = logits.float()
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
    confidence = ALGS[config.alg](Softmax(exp, total, best, p, entropy if config.alg in USE_ENTROPY else None))
    tokens = place if ids is None else ids.gather(-1, place[:, None]).squeeze(-1)
    return Proposal(tokens, confidence, p, entropy)


def priority(confidence: np.ndarray, uniforms: np.ndarray | None, config: SamplingConfig) -> np.ndarray:
    """[N] priorities; the highest are committed first.

    At a temperature T above 0 the k highest of confidence/T + Gumbel noise are k positions drawn without replacement
    from softmax(confidence/T) (arXiv 1903.06059).

    Args:
        confidence: [N].
        uniforms: [N] draws in [0, 1); unused at temperature 0.
    """
    if config.order_temp == 0:
        return confidence
    return confidence / config.order_temp + gumbel(uniforms)


def gumbel(uniforms: np.ndarray) -> np.ndarray:
    """Gumbel noise from uniforms in [0, 1)."""
    return -np.log(-np.log(uniforms.astype(np.float64).clip(1e-12, 1 - 1e-12)))
