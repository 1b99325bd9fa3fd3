"""The forward process: mask each response token with probability t."""

import numpy as np
import torch
from torch import Tensor

from diffllm.config import DiffusionConfig
from diffllm.weights import time_weights

_NOISE = 3  # first word of the keys; orders of rows have 1, cuts 2, attention 4, windows of a stream 5


class ForwardProcess:
    """Noises a batch. A row's noise is a pure function of (seed, epoch, sample index, repeat within the epoch).

    Unless t is drawn independently, its place in the global batch enters too. Neither rank nor worker, micro-batch,
    padding or wall time do, so a run sees the same x_t in any layout and after any resume.
    """

    def __init__(self, config: DiffusionConfig, mask_token_id: int, seed: int):
        self.config, self.mask_token_id, self.seed = config, mask_token_id, seed

    def __call__(self, batch: dict[str, Tensor], epoch: int, batch_size: int) -> dict[str, Tensor]:
        """Add x_t, masked, t and weights to a batch.

        Args:
            batch: input_ids [B, L], maskable [B, L], attention_mask [B, L], sample_index [B], slot [B]: the row's
                place in the global batch, and, where rows come more than once in an epoch, repeat [B].
            batch_size: rows of the global batch, over which stratified t is spread.

        Returns:
            The batch with x_t [B, L], masked [B, L], t [B], importance [B] (density of t under U(eps, 1) / density it
            was drawn with) and weights [B, L] (time reweighting · importance, 0 where not masked).
        """
        maskable = batch["maskable"]
        t = torch.empty(len(maskable), dtype=torch.float64)
        uniforms = torch.ones(maskable.shape, dtype=torch.float64)
        repeats = batch["repeat"].tolist() if "repeat" in batch else [0] * len(t)
        for row, (sample, repeat) in enumerate(zip(batch["sample_index"].tolist(), repeats, strict=True)):
            rng = np.random.default_rng((_NOISE, self.seed, epoch, sample, *([repeat] if repeat else [])))
            t[row] = self.time(rng.random(), int(batch["slot"][row]), batch_size)
            uniforms[row, maskable[row]] = torch.from_numpy(rng.random(int(maskable[row].sum())))

        masked = maskable & (uniforms < t[:, None])
        importance = self.importance(t)
        weights = time_weights(t, masked, batch["attention_mask"].bool(), self.config)
        return {
            **batch,
            "x_t": torch.where(masked, self.mask_token_id, batch["input_ids"]),
            "masked": masked,
            "t": t.float(),
            "importance": importance.float(),
            "weights": weights * importance[:, None].float(),
        }

    def time(self, uniform: float, slot: int, batch_size: int) -> float:
        """t in [eps, 1) from a uniform draw, or from the draw within the slot's share of [0, 1).

        The gradient of a row has a second moment near w(t)²·t where its tokens hardly correlate. The density of least
        variance is as its root, 1/√t under the weights 1/t: the square of a uniform draw.
        """
        eps = self.config.eps
        if self.config.t_sampler != "uniform":
            uniform = (slot + uniform) / batch_size
        if self._prefers_small_t:
            return (eps**0.5 + (1 - eps**0.5) * uniform) ** 2
        return eps + (1 - eps) * uniform

    def importance(self, t: Tensor) -> Tensor:
        """Density of t [B] under U(eps, 1) over the density that `time` draws it with: Σ weight·nll keeps its mean."""
        if self._prefers_small_t:
            return 2 * t.sqrt() / (1 + self.config.eps**0.5)
        return torch.ones_like(t)

    @property
    def _prefers_small_t(self) -> bool:
        return self.config.t_sampler == "importance" and self.config.time_reweighting == "original"
