"""Validation with fixed noise."""

from collections.abc import Iterable

import torch

from data import Batch
from diffllm import DiffLLM
from diffllm.diffusion import Objective
from trainer.distributed import Distributed


@torch.no_grad()
def validate(
    model: DiffLLM, objective: Objective, batches: Iterable[Batch], distributed: Distributed
) -> dict[str, float]:
    """Metrics of an objective over the validation rows of all ranks. Collective."""
    model.eval()
    sums = sum(objective.measure(batch, objective.loss(model, batch)) for batch in batches)
    model.reshard()
    model.train()
    return {f"val/{name}": value for name, value in objective.metrics(distributed.sum(*sums)).items()}
