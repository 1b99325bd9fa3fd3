"""The loss: cross entropy of the masked tokens, weighted and normalised."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffllm.config import DiffusionConfig

LOGITS_PER_CHUNK = 2**25  # 128 MiB in float32


def masked_cross_entropy(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Cross entropy through the vocabulary projection, a chunk of positions at a time.

    Only one chunk's logits exist at any moment: the backward pass computes them again.

    Args:
        head: projects [n, D] to logits [n, V].
        hidden: [N, D] states that predict the masked tokens.
        targets: [N] clean tokens.

    Returns:
        nll [N] in float32 and correct [N], whether the most likely token is the target.
    """
    chunk = max(1, LOGITS_PER_CHUNK // vocab_size)
    if len(hidden) <= chunk:
        return _cross_entropy(head, hidden, targets)
    pieces = [
        checkpoint(_cross_entropy, head, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    nll, correct = zip(*pieces, strict=True)
    return torch.cat(nll), torch.cat(correct)


def _cross_entropy(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    nll = F.cross_entropy(logits, targets, reduction="none")
    return nll, logits.detach().argmax(-1) == targets


def weighted_sum(nll: Tensor, weights: Tensor, config: DiffusionConfig) -> Tensor:
    """Σ weight·nll over the masked positions, the numerator of the loss.

    With token reweighting nll becomes alpha·(1 - exp(-nll))^gamma·nll: the focal loss (arXiv 1708.02002, eq. 5), which
    plays down what the model already knows.

    Args:
        nll: [N].
        weights: [N] time reweighting.
    """
    if config.token_reweighting:
        focal = (1 - torch.exp(-nll)) ** config.token_reweighting_gamma
        nll = config.token_reweighting_alpha * focal * nll
    return (weights * nll).sum()
