"""Absorbing-state diffusion: mask each response token with probability t, and restore it.

MDLM (arXiv 2406.07524), LLaDA (arXiv 2502.09992), Dream (arXiv 2508.15487).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data import Batch
from data.batches import Stream
from data.settings import setting
from diffllm.attention import visibility_of
from diffllm.diffusion.loss import CROSS_ENTROPY, Focal, LossOutput, TokenLoss
from diffllm.diffusion.objective import Objective, ObjectiveConfig
from diffllm.diffusion.weights import TIME_REWEIGHTINGS, time_weights
from sampling import to_device

T_SAMPLERS = ("importance", "stratified", "uniform", "cosine")
LOSS_NORMS = ("masked", "maskable", "sequence")
T_BUCKETS = 4


@dataclass
class DiffusionConfig(ObjectiveConfig):
    """The forward process and the weights of the loss.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    objective: str = "masked"
    # importance: stratified, and with time_reweighting=original small t are drawn more often and weighted less |
    # stratified over the global batch | uniform, independent draws | cosine: large t are drawn more often, and not
    # weighted less (MaskGIT, arXiv 2202.04200)
    t_sampler: str = setting("importance", choices=T_SAMPLERS)
    eps: float = setting(1e-3, above=0, below=1)  # t is in [eps, 1)
    # none: 1 | original: 1/t | linear: 1-t | cart: by the unmasked neighbours
    time_reweighting: str = setting("original", choices=TIME_REWEIGHTINGS)
    # parameter of CART's geometric distribution; 1 counts the two direct neighbours only
    cart_p: float = setting(0.1, above=0, at_most=1, used_with={"time_reweighting": ("cart",)})
    token_reweighting: bool = False  # focal: alpha·(1 - exp(-nll))^gamma·nll
    # alpha of that formula
    token_reweighting_alpha: float = setting(0.25, at_least=0, used_with={"token_reweighting": ()})
    # gamma of that formula
    token_reweighting_gamma: float = setting(2.0, at_least=0, used_with={"token_reweighting": ()})
    # denominator of the loss: masked tokens | maskable tokens | sequences
    loss_norm: str = setting("maskable", choices=LOSS_NORMS)

    @property
    def prefers_small_t(self) -> bool:
        """Whether small t are drawn more often, by importance sampling."""
        return self.t_sampler == "importance" and self.time_reweighting == "original"

    @property
    def loss_share(self) -> float:
        """The mean of t, see `MaskedDiffusion.time`."""
        if self.prefers_small_t:
            return (1 + self.eps**0.5 + self.eps) / 3
        return self.eps + (1 - self.eps) * (2 / math.pi if self.t_sampler == "cosine" else 1 / 2)

    @property
    def token_loss(self) -> TokenLoss:
        """Cross entropy, or focal if `token_reweighting`."""
        if not self.token_reweighting:
            return CROSS_ENTROPY
        return Focal(self.token_reweighting_alpha, self.token_reweighting_gamma)


class MaskedDiffusion(Objective):
    """Restores the masked tokens of x_t.

    A row's noise is a pure function of (seed, epoch, sample index, repeat within the epoch), and of its place in the
    global batch if t is stratified. Rank, worker, micro-batch, padding and wall time never enter: a run sees the same
    x_t in any layout and after any resume.
    """

    settings = DiffusionConfig
    config: DiffusionConfig

    def for_validation(self, seed: int) -> "MaskedDiffusion":
        """Objective with the weights of the likelihood bound, whatever weights training has."""
        return type(self)(type(self.config)(eps=self.config.eps), self.mask_token_id, seed)

    def corrupt(self, batch: Batch, epoch: int) -> Batch:
        """Add x_t, masked, t, importance and weights, [B, L] each.

        importance is the density of t under U(eps, 1) over the density of its draw. weights are time reweighting times
        importance, or without it for t_sampler=cosine, 0 where not masked.
        """
        maskable = batch["maskable"]
        t, uniforms = torch.ones(2, *maskable.shape, dtype=torch.float64)
        repeats = batch["repeat"].tolist() if "repeat" in batch else [0] * len(t)
        for row, (sample, repeat) in enumerate(zip(batch["sample_index"].tolist(), repeats, strict=True)):
            rng = np.random.default_rng((Stream.NOISE, self.seed, epoch, sample, *([repeat] if repeat else [])))
            t[row] = self.times({name: tensor[row] for name, tensor in batch.items()}, rng)
            uniforms[row, maskable[row]] = torch.from_numpy(rng.random(int(maskable[row].sum())))

        masked = maskable & (uniforms < t)
        importance = self.importance(t)
        weights = time_weights(
            t, masked, batch["attention_mask"].bool(), self.config.time_reweighting, self.config.cart_p
        )
        return {
            **batch,
            "x_t": torch.where(masked, self.mask_token_id, batch["input_ids"]),
            "masked": masked,
            "t": t.float().contiguous(),
            "importance": importance.float().contiguous(),
            "weights": weights * self._in_loss(importance).float(),
        }

    def times(self, row: Batch, rng: np.random.Generator) -> Tensor | float:
        """Draw t of a row, for each position [L] or for all of them.

        Args:
            row: the fields of `corrupt`, without their first dimension.
        """
        return self.time(self.stratify(rng.random(), row))

    def stratify(self, uniform: float | np.ndarray, row: Batch) -> float | np.ndarray:
        """Put draws in [0, 1) into the row's part of [0, 1), of one part a row of the global batch."""
        if self.config.t_sampler == "uniform":
            return uniform
        return (int(row["slot"]) + uniform) / int(row["batch_size"])

    def time(self, uniform: float) -> float:
        """t in [eps, 1) from a number in [0, 1).

        The gradient of a row has a second moment near w(t)²·t if its tokens hardly correlate. The best proposal is
        ∝ w(t)·√t; for w = 1/t, square a uniform draw.
        """
        eps = self.config.eps
        if self.config.prefers_small_t:
            return (eps**0.5 + (1 - eps**0.5) * uniform) ** 2
        if self.config.t_sampler == "cosine":
            uniform = math.sin(math.pi / 2 * uniform)
        return eps + (1 - eps) * uniform

    def importance(self, t: Tensor) -> Tensor:
        """Density of t under U(eps, 1) over the density of `time`: means weighted by it are those of uniform t."""
        eps = self.config.eps
        if self.config.prefers_small_t:
            return 2 * t.sqrt() / (1 + eps**0.5)
        if self.config.t_sampler == "cosine":
            return math.pi / 2 * (1 - ((t - eps) / (1 - eps)).square()).clamp(min=0).sqrt()
        return torch.ones_like(t)

    def _in_loss(self, importance: Tensor) -> Tensor:
        """The importance that the loss corrects for."""
        return torch.ones_like(importance) if self.config.t_sampler == "cosine" else importance

    def denominator(self, batch: Batch) -> Tensor:
        """The batch's part of the step's loss denominator, a float64 scalar.

        `masked` counts masked tokens by their importance in the loss · `maskable` the tokens that may be masked, as in
        the ELBO · `sequence` rows.
        """
        match self.config.loss_norm:
            case "masked":
                return (batch["masked"] * self._in_loss(batch["importance"]).double()).sum()
            case "maskable":
                return self.tokens(batch).double()
            case "sequence":
                return torch.tensor(len(batch["sample_index"]), dtype=torch.float64)
            case norm:
                raise NotImplementedError(f"diffusion.loss_norm={norm}")

    def tokens(self, batch: Batch) -> Tensor:
        """Number of tokens whose likelihood the loss bounds, a scalar."""
        return batch["maskable"].sum()

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Σ weight·token loss over the masked tokens."""
        device = model.device
        names = ("x_t", "input_ids", "masked", "weights", "position_ids")
        x_t, x_0, masked, weights, position_ids = (to_device(batch[name], device) for name in names)
        where = tuple(to_device(index, device) for index in self.positions(batch))
        seen = {"position_ids": position_ids, "visibility": visibility_of(batch), "where": where}
        return model(x_t, x_0, masked, weights, token_loss=self.config.token_loss, **seen)

    def measure(self, batch: Batch, output: LossOutput) -> Tensor:
        """[3 + 2·T_BUCKETS] Σ nll/t, maskable tokens, Σ correct, then nll and tokens by bucket of t.

        Every masked token is weighted by its importance.
        """
        row, column = self.positions(batch)
        device = output.nll.device
        t, importance = (to_device(batch[name][row, column], device).double() for name in ("t", "importance"))
        nll = output.nll * importance
        sums = torch.zeros(3 + 2 * T_BUCKETS, dtype=torch.float64, device=device)
        sums[0] = (nll / t).sum()
        sums[1].fill_(int(self.tokens(batch)))  # the host's number in the kernel: `sums[1] = …` copies, and waits
        sums[2] = (output.correct * importance).sum()
        bucket = (t * T_BUCKETS).long().clamp(max=T_BUCKETS - 1)
        sums[3 : 3 + T_BUCKETS].index_add_(0, bucket, nll)
        sums[3 + T_BUCKETS :].index_add_(0, bucket, importance)
        return sums

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Means under t ~ U(eps, 1); none if nothing was masked.

        Returns:
            elbo: nats a token, Σ nll/t over masked tokens / number of response tokens: an upper bound on the negative
            log-likelihood, with one Monte-Carlo draw of t a row.
            perplexity_bound: exp(elbo).
            masked_accuracy: share of masked tokens that are the most likely one.
            nll_t_A_B: mean nll of the masked tokens with t in [A, B), if any.
        """
        weighted, tokens, correct, *by_bucket = sums
        nlls, counts = by_bucket[:T_BUCKETS], by_bucket[T_BUCKETS:]
        masked = sum(counts)
        if not masked:
            return {}
        elbo = weighted / tokens
        return {
            "elbo": elbo,
            "perplexity_bound": math.exp(min(elbo, 700)),
            "masked_accuracy": correct / masked,
            **{
                f"nll_t_{i / T_BUCKETS:g}_{(i + 1) / T_BUCKETS:g}": nlls[i] / counts[i]
                for i in range(T_BUCKETS)
                if counts[i]
            },
        }
