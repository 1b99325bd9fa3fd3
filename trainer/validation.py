"""Validation with fixed noise: the bound on the likelihood, and how well masked tokens are restored."""

from collections.abc import Iterable

import torch

from data.loader import Batch
from diffllm import DiffLLM
from trainer.forward import forward
from trainer.tally import Tally
from trainer.world import World


@torch.no_grad()
def validate(model: DiffLLM, batches: Iterable[Batch], world: World) -> dict[str, float]:
    """Metrics of `Tally` over all validation rows of all ranks. Collective."""
    model.eval()
    tally = Tally(world)
    for batch in batches:
        tally.add(batch, forward(model, batch, world))
    model.reshard()
    model.train()
    metrics = tally.metrics("val")
    del metrics["val/loss"]
    return metrics
