"""The published generation procedure, as the reference that the benchmarks time.

Every step forwards all rows and makes the logits of all positions in float32, whether anything is committed or not; the
masked ones are then taken out, softmax goes over the vocabulary, and top-p sorts it.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from diffllm import DiffLLM
from sampling import SamplingConfig


@torch.no_grad()
def published_sample(
    model: DiffLLM,
    input_ids: Tensor,
    config: SamplingConfig,
    attention_mask: Tensor | None = None,
    history: list[Tensor] | None = None,
) -> Tensor:
    """[B, L] prompts and responses; `config` gives steps, alg, temperature and top_p of the linear schedule.

    Args:
        input_ids: [B, P] prompts, left-padded.
        attention_mask: [B, P], 0 at the padding; None where no row is padded.
        history: gets the canvases [B, L] after each step.
    """
    x = F.pad(input_ids, (0, config.max_new_tokens), value=model.mask_token_id)
    position_ids = None
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, config.max_new_tokens), value=1)
        position_ids = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    grid = torch.linspace(1, config.eps, config.steps + 1)
    for step, (t, s) in enumerate(pairwise(grid)):
        masked = x == model.mask_token_id
        logits = model.logits(x, attention_mask, position_ids).float()
        if model.family.shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        confidence, tokens = _draw(logits[masked], config)
        last = step == config.steps - 1
        per_row = masked.sum() / len(x)
        n_commit = int(per_row) if last else int(per_row * (1 - s / t))
        if n_commit:
            everywhere = torch.full_like(x, -torch.inf, dtype=torch.float32)
            everywhere[masked] = confidence
            proposed = torch.full_like(x, model.mask_token_id)
            proposed[masked] = tokens
            columns = everywhere.topk(n_commit, dim=-1).indices
            x.scatter_(1, columns, proposed.gather(1, columns))
        if history is not None:
            history.append(x.clone())
    return x


def _draw(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Confidence and token [N] of masked positions, from logits [N, V] after temperature and top-p."""
    if config.temperature > 0:
        logits = logits / config.temperature
    if config.top_p is not None and config.top_p < 1:
        logits = _nucleus(logits, config.top_p)
    p = torch.softmax(logits, dim=-1)
    if config.temperature > 0:
        tokens = torch.multinomial(p, 1)
        confidence, tokens = p.gather(-1, tokens).squeeze(-1), tokens.squeeze(-1)
    else:
        confidence, tokens = p.max(dim=-1)
    match config.alg:
        case "origin":
            confidence = torch.rand_like(confidence)
        case "topk_margin":
            ordered = p.sort(dim=-1, descending=True).values
            confidence = ordered[:, 0] - ordered[:, 1]
        case "entropy":
            confidence = (p * torch.log(p + 1e-10)).sum(-1)
    return confidence, tokens


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits [N, V] with -inf outside the nucleus."""
    values, ids = logits.sort(dim=-1, descending=True)
    p = torch.softmax(values, dim=-1)
    outside = p.cumsum(-1) - p > top_p
    return logits.masked_fill(outside.scatter(-1, ids, outside), -torch.inf)
