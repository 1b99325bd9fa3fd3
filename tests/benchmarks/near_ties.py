"""How near two samplers are where they first differ. With random weights and rounding, near ties decide."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffllm import DiffLLM
from sampling import SamplingConfig
from sampling.confidence import propose


@torch.no_grad()
def first_difference(
    model: DiffLLM, before: Tensor, ours: Sequence[Tensor], theirs: Sequence[Tensor], config: SamplingConfig
) -> float:
    """The larger of two gaps at the first step whose canvases differ, over all rows; 0 if no step does.

    The gaps are those between the confidences of the positions that only one of both committed, and between the log
    probabilities of two tokens at the same position. Both are computed from the canvas before the step.

    Args:
        before: [B, L] canvases at the start, without padding.
        ours, theirs: canvases [B, L] after each step.
    """
    gap, done = 0.0, torch.zeros(len(before), dtype=torch.bool, device=before.device)
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.to(before.device), b.to(before.device)
        for row in ((a != b).any(-1) & ~done).nonzero().flatten().tolist():
            done[row] = True
            gap = max(gap, _gap(model, before[row], a[row], b[row], config))
        before = a
    return gap


def _gap(model: DiffLLM, before: Tensor, a: Tensor, b: Tensor, config: SamplingConfig) -> float:
    mask = model.mask_token_id
    at = ((before == mask) & (a != b)).nonzero().flatten()
    logits = model.denoise(before[None])[0, at].float()
    log_p, confidence = logits.log_softmax(-1), propose(logits.clone(), None, config).confidence
    both = (a[at] != mask) & (b[at] != mask)
    gaps = [(log_p[both, a[at[both]]] - log_p[both, b[at[both]]]).abs()]
    gaps.append((confidence[~both].amax() - confidence[~both].amin())[None] if (~both).any() else gaps[0])
    return float(torch.cat(gaps).max())
