"""What token a masked position would become, and how sure the model is of it.

Confidence is a property of the model's distribution, temperature of the draw. Computing the first after the second
makes every confidence tie at 1 as the temperature goes to 0, and the positions are then filled from left to right.
"""

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from sampling.config import SamplingConfig


def propose(logits: Tensor, uniforms: Tensor | None, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw a token for every candidate position and rate it.

    Args:
        logits: [N, V] at the candidates.
        uniforms: [N] in [0, 1), one draw a position; unused at temperature 0.

    Returns:
        tokens [N] and their confidence [N] in float32, higher is surer.
    """
    logits = logits.float()
    scaled = warp(logits, config)
    tokens = scaled.argmax(-1) if config.temperature == 0 else inverse_cdf(scaled.softmax(-1), uniforms)
    rated = scaled if config.confidence == "scaled" else logits
    return tokens, confidence(rated.softmax(-1), tokens, config.alg)


def warp(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Temperature, then top-p, then top-k, in the published order; dropped tokens get -inf."""
    if config.temperature > 0:
        logits = logits / config.temperature
    if config.top_p is not None and config.top_p < 1:
        logits = TopPLogitsWarper(config.top_p)(None, logits)
    if config.top_k is not None:
        logits = TopKLogitsWarper(config.top_k)(None, logits)
    return logits


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Sample from probs [N, V] with one uniform [N] in [0, 1) a row; float64 keeps the tail of a large vocabulary."""
    cdf = probs.double().cumsum(-1)
    return torch.searchsorted(cdf, (uniforms.double() * cdf[:, -1])[:, None], right=True).squeeze(-1)


def confidence(probs: Tensor, tokens: Tensor, alg: str) -> Tensor:
    """Rate the candidates.

    `maskgit_plus` (arXiv 2202.04200) p(token) · `topk_margin` (arXiv 2502.06768) p of the first minus p of the second ·
    `entropy` Σ p log p, the negative entropy · `origin` (arXiv 2107.03006) the same for all: the order is random.

    Args:
        probs: [N, V].
        tokens: [N], the token drawn at each.

    Returns:
        [N], higher is surer.
    """
    if alg == "maskgit_plus":
        return probs.gather(-1, tokens[:, None]).squeeze(-1)
    if alg == "topk_margin":
        first, second = probs.topk(2, dim=-1).values.unbind(-1)
        return first - second
    if alg == "entropy":
        return -torch.special.entr(probs).sum(-1)
    return probs.new_zeros(len(probs))


def priority(confidence: Tensor, uniforms: Tensor | None, config: SamplingConfig) -> Tensor:
    """Order in which positions are committed: the highest first.

    With alg_temp > 0 the k highest of confidence/alg_temp + Gumbel noise are k positions drawn without replacement from
    softmax(confidence/alg_temp) (arXiv 1903.06059). `origin` is the same with equal confidences.

    Args:
        confidence: [N].
        uniforms: [N] in [0, 1), one draw a position; unused when the order is by confidence alone.
    """
    if config.alg != "origin" and config.alg_temp == 0:
        return confidence
    gumbel = -torch.log(-torch.log(uniforms.double().clamp(1e-12, 1 - 1e-12)))
    return gumbel if config.alg == "origin" else confidence.double() / config.alg_temp + gumbel
