"""Anneal attention from causal to bidirectional over some steps (DiffuLLaMA, arXiv 2410.17891)."""

import numpy as np
import torch
from torch import Tensor

from data.batches import Stream


class AttentionAnnealing:
    """Lets a position see each later position with probability s/S in step s of S, and all earlier ones.

    A step has one draw, indexed by the positions of query and key, whatever the ranks and micro-batches.

    Args:
        steps: S; from step S on attention is full.
        size: tokens of the longest row.
    """

    def __init__(self, steps: int, size: int, seed: int):
        self.steps, self.size, self.seed = steps, size, seed

    def __call__(self, micro_batches: list[dict[str, Tensor]], step: int) -> list[dict[str, Tensor]]:
        """Add pairs [B, L, L], whether the first position sees the second, before step S.

        Args:
            micro_batches: each has position_ids [B, L], which count the attended tokens.
        """
        if step >= self.steps:
            return micro_batches
        positions = [batch["position_ids"] for batch in micro_batches]
        sees = self._draw(step, 1 + max(int(ids.max()) for ids in positions))
        return [
            {**batch, "pairs": sees[ids[:, :, None], ids[:, None, :]]}
            for batch, ids in zip(micro_batches, positions, strict=True)
        ]

    def _draw(self, step: int, longest: int) -> Tensor:
        rng = np.random.default_rng((Stream.ATTENTION, self.seed, step))
        drawn = rng.random((longest, self.size), dtype=np.float32)[:, :longest] < step / self.steps
        return torch.from_numpy(drawn).logical_or_(torch.ones(drawn.shape, dtype=torch.bool).tril_())
