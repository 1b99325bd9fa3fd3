"""Validation with fixed noise: the bound on the likelihood, and how well masked tokens are restored."""

import math
from collections.abc import Iterable

import torch

from data.loader import Batch
from diffllm import DiffLLM
from trainer.forward import forward
from trainer.world import World

T_BUCKETS = 4


@torch.no_grad()
def validate(model: DiffLLM, batches: Iterable[Batch], world: World) -> dict[str, float]:
    """Metrics over all validation rows of all ranks. Collective.

    Returns:
        elbo: nats a token, Σ nll/t over the masked tokens / number of response tokens: an upper bound on the negative
        log-likelihood, one Monte-Carlo draw of t a row, spread evenly over the rows.
        perplexity_bound: exp(elbo).
        masked_accuracy: share of the masked tokens whose most likely token is the clean one.
        nll_t_A_B: mean nll of the masked tokens of rows with t in [A, B); left out where no token is.
    """
    model.eval()
    sums = torch.zeros(3 + 2 * T_BUCKETS, dtype=torch.float64)
    for batch in batches:
        masked = batch["masked"]
        nll, correct = forward(model, batch, world)
        nll, correct = nll.double().cpu(), correct.cpu()
        bucket = (batch["t"][:, None].expand(masked.shape)[masked] * T_BUCKETS).long().clamp(max=T_BUCKETS - 1)
        sums[0] += (batch["weights"][masked] * nll).sum()
        sums[1] += batch["maskable"].sum()
        sums[2] += correct.sum()
        sums[3 : 3 + T_BUCKETS].index_add_(0, bucket, nll)
        sums[3 + T_BUCKETS :] += torch.bincount(bucket, minlength=T_BUCKETS)
    model.reshard()
    model.train()

    weighted, tokens, correct, *by_bucket = world.sum(*sums)
    nlls, counts = by_bucket[:T_BUCKETS], by_bucket[T_BUCKETS:]
    elbo = weighted / tokens
    return {
        "val/elbo": elbo,
        "val/perplexity_bound": math.exp(min(elbo, 700)),
        "val/masked_accuracy": correct / max(sum(counts), 1),
        **{
            f"val/nll_t_{i / T_BUCKETS:g}_{(i + 1) / T_BUCKETS:g}": nlls[i] / counts[i]
            for i in range(T_BUCKETS)
            if counts[i]
        },
    }
