"""Validation with fixed noise: the bound on the likelihood, and how well masked tokens are restored."""

from collections.abc import Iterable

import torch

from data.batches import Batch
from diffllm import DiffLLM
from trainer.distributed import Distributed
from trainer.forward import forward
from trainer.tally import Tally


@torch.no_grad()
def validate(model: DiffLLM, batches: Iterable[Batch], distributed: Distributed) -> dict[str, float]:
    """Metrics of `Tally` over all validation rows of all ranks. Collective."""
    model.eval()
    tally = Tally(distributed)
    for batch in batches:
        tally.add(batch, forward(model, batch, distributed))
    model.reshard()
    model.train()
    metrics = tally.metrics("val")
    del metrics["val/loss"]
    return metrics
