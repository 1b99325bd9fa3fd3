"""Sums over masked tokens, and the figures made of them."""

import math

import torch

from data.batches import Batch
from diffllm.modeling_diffllm import LossOutput
from trainer.distributed import Distributed

T_BUCKETS = 4


class Tally:
    """Collects what the model makes of batches; their sums over all ranks become metrics."""

    def __init__(self, distributed: Distributed):
        self.distributed = distributed
        self.sums = torch.zeros(4 + 2 * T_BUCKETS, dtype=torch.float64, device=distributed.device)

    def add(self, batch: Batch, restored: LossOutput, loss: torch.Tensor | float = 0.0) -> None:
        """Count a batch; nothing waits for the device."""
        masked, device = batch["masked"], self.distributed.device
        per_row = torch.stack([batch["t"], batch["importance"]], dim=-1)[:, None].expand(*masked.shape, 2)
        t, weight = per_row[masked].to(device, non_blocking=True).double().unbind(-1)
        nll = restored.nll * weight
        bucket = (t * T_BUCKETS).long().clamp(max=T_BUCKETS - 1)
        self.sums[0] += loss
        self.sums[1] += (nll / t).sum()
        self.sums[2] += batch["maskable"].sum()
        self.sums[3] += (restored.correct * weight).sum()
        self.sums[4 : 4 + T_BUCKETS].index_add_(0, bucket, nll)
        self.sums[4 + T_BUCKETS :].index_add_(0, bucket, weight)

    def metrics(self, group: str) -> dict[str, float]:
        """Over all batches of all ranks, each row weighted by its importance: means under t ~ U(eps, 1). Collective.

        Returns:
            loss: the sum of the losses given.
            elbo: nats a token, Σ nll/t over the masked tokens / number of response tokens: an upper bound on the
            negative log-likelihood, one Monte-Carlo draw of t a row.
            perplexity_bound: exp(elbo).
            masked_accuracy: share of the masked tokens whose most likely token is the clean one.
            nll_t_A_B: mean nll of the masked tokens of rows with t in [A, B); left out where no token is.
        """
        loss, weighted, tokens, correct, *by_bucket = self.distributed.sum(*self.sums)
        nlls, counts = by_bucket[:T_BUCKETS], by_bucket[T_BUCKETS:]
        elbo = weighted / max(tokens, 1)
        return {
            f"{group}/loss": loss,
            f"{group}/elbo": elbo,
            f"{group}/perplexity_bound": math.exp(min(elbo, 700)),
            f"{group}/masked_accuracy": correct / masked if (masked := sum(counts)) else 0.0,
            **{
                f"{group}/nll_t_{i / T_BUCKETS:g}_{(i + 1) / T_BUCKETS:g}": nlls[i] / counts[i]
                for i in range(T_BUCKETS)
                if counts[i]
            },
        }
