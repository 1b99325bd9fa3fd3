"""The forward process: mask each response token with probability t."""

import numpy as np
import torch
from torch import Tensor

from diffllm.config import DiffusionConfig
from diffllm.weights import time_weights

_NOISE = 3  # first word of the keys; the data road has 1 and 2


class ForwardProcess:
    """Noises a batch. A row's noise is a pure function of (seed, epoch, sample index).

    With stratified t its place in the global batch enters too. Neither rank nor worker, micro-batch, padding or wall
    time do, so a run sees the same x_t in any layout and after any resume.
    """

    def __init__(self, config: DiffusionConfig, mask_token_id: int, seed: int):
        self.config, self.mask_token_id, self.seed = config, mask_token_id, seed

    def __call__(self, batch: dict[str, Tensor], epoch: int, batch_size: int) -> dict[str, Tensor]:
        """Add x_t, masked, t and weights to a batch.

        Args:
            batch: input_ids [B, L], maskable [B, L], attention_mask [B, L], sample_index [B], and slot [B]: the row's
                place in the global batch.
            batch_size: rows of the global batch, over which stratified t is spread.

        Returns:
            The batch with x_t [B, L], masked [B, L], t [B] and weights [B, L] (0 where not masked).
        """
        maskable = batch["maskable"]
        t = torch.empty(len(maskable), dtype=torch.float64)
        uniforms = torch.ones(maskable.shape, dtype=torch.float64)
        for row, (sample, slot) in enumerate(zip(batch["sample_index"].tolist(), batch["slot"].tolist(), strict=True)):
            rng = np.random.default_rng((_NOISE, self.seed, epoch, sample))
            t[row] = self.time(rng.random(), slot, batch_size)
            uniforms[row, maskable[row]] = torch.from_numpy(rng.random(int(maskable[row].sum())))

        masked = maskable & (uniforms < t[:, None])
        return {
            **batch,
            "x_t": torch.where(masked, self.mask_token_id, batch["input_ids"]),
            "masked": masked,
            "t": t.float(),
            "weights": time_weights(t, masked, batch["attention_mask"].bool(), self.config),
        }

    def time(self, uniform: float, slot: int, batch_size: int) -> float:
        """t in [eps, 1): the draw itself, or the draw within the slot's share of [0, 1)."""
        if self.config.t_sampler == "stratified":
            uniform = (slot + uniform) / batch_size
        return self.config.eps + (1 - self.config.eps) * uniform
