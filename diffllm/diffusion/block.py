"""Block diffusion: masked diffusion within a block of positions, given the clean blocks before it.

BD3-LM (arXiv 2503.09573). The canvas is x_0 and noised copies of it, side by side, with the same position ids; a noised
block sees itself and the earlier blocks of x_0. Positions that no masked token depends on are left out. Blocks are
counted from the first token of a row. One block as long as the row is masked diffusion; blocks of one token, all
masked, are next-token prediction if the logits are shifted.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data import Batch
from data.settings import setting
from diffllm.diffusion.copies import documents, highest, needed_positions, side_by_side
from diffllm.diffusion.loss import LossOutput
from diffllm.diffusion.masked import DiffusionConfig, MaskedDiffusion
from diffllm.diffusion.weights import time_weights
from sampling import to_device


@dataclass
class BlockConfig(DiffusionConfig):
    """Masked diffusion by blocks.

    Raises:
        ValueError: a value outside its range, or settings that exclude each other; the message names them.
    """

    objective: str = "block"
    block_length: int = setting(32, at_least=1)  # positions of a block
    # block lengths before block_length, each for block_warmup_steps, such as [1, 4] (LLaDA2.0, arXiv 2512.15745)
    block_warmup: list[int] = setting([], at_least=1)
    block_warmup_steps: int = setting(0, at_least=0)  # optimizer steps with each of block_warmup
    # lowest and highest t of training, such as [0.3, 0.8] (clipped schedule, arXiv 2503.09573); null: [eps, 1)
    mask_ratio: list[float] | None = setting(None, above=0, at_most=1)
    # a second copy masks the response tokens that the first one leaves clean (Fast-dLLM v2, arXiv 2509.26328)
    complementary: bool = False

    @property
    def copies(self) -> int:
        """Number of x_0 and its noised copies together."""
        return 3 if self.complementary else 2

    @property
    def loss_share(self) -> float:
        """Share of the response tokens in the loss of a step, on average."""
        if self.complementary:
            return 1.0
        return sum(self.mask_ratio) / 2 if self.mask_ratio else super().loss_share

    @property
    def attention(self) -> str:
        steps = self.block_warmup_steps
        lengths = [f"{length} to step {(i + 1) * steps:,}" for i, length in enumerate(self.block_warmup)]
        lengths.append(f"{'then ' if lengths else ''}{self.block_length}")
        copies = "two noised copies" if self.complementary else "a noised copy"
        return f"by blocks of {', '.join(lengths)}; x_0 beside {copies}"

    @property
    def settles(self) -> tuple[str, int]:
        return "block_warmup_steps", len(self.block_warmup) * self.block_warmup_steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_annealing_steps:
            raise ValueError(
                f"diffusion.attention_annealing_steps={self.attention_annealing_steps}: blocks decide what a position "
                "sees; set it to 0, or choose diffusion=elbo"
            )
        if bool(self.block_warmup) != bool(self.block_warmup_steps):
            raise ValueError(
                f"diffusion.block_warmup={self.block_warmup} with diffusion.block_warmup_steps="
                f"{self.block_warmup_steps}: give both, or neither"
            )
        if self.time_reweighting == "cart":
            raise ValueError(
                "diffusion.time_reweighting=cart: it weighs by clean neighbours, of which a block does not see the "
                "later ones; choose none, original or linear"
            )
        if self.mask_ratio is not None and not (
            len(self.mask_ratio) == 2 and self.mask_ratio == sorted(self.mask_ratio)
        ):
            raise ValueError(
                f"diffusion.mask_ratio={self.mask_ratio}: must be the lowest and the highest t, such as [0.3,0.8]"
            )
        for name in ("mask_ratio", "complementary"):
            if getattr(self, name) and self.t_sampler in ("importance", "cosine"):
                raise ValueError(
                    f"diffusion.{name}={getattr(self, name)}: needs even draws of t, diffusion.t_sampler=stratified or "
                    f"uniform, not {self.t_sampler}"
                )


class BlockDiffusion(MaskedDiffusion):
    """Restores the masked tokens of each block, which has a t of its own."""

    settings = BlockConfig
    config: BlockConfig

    def for_validation(self, seed: int) -> "BlockDiffusion":
        """Objective with the weights and times of the likelihood bound, whatever training has."""
        config = BlockConfig(eps=self.config.eps, block_length=self.config.block_length)
        return BlockDiffusion(config, self.mask_token_id, seed)

    def length_at(self, batch: Batch) -> int:
        """Block length at the batch's optimizer step. `batch` may be one row of it."""
        warmup, steps = self.config.block_warmup, self.config.block_warmup_steps
        stage = int(batch["step"].flatten()[0]) // steps if warmup and "step" in batch else len(warmup)
        return [*warmup, self.config.block_length][min(stage, len(warmup))]

    @property
    def noised(self) -> int:
        """Number of noised copies of a row."""
        return self.config.copies - 1

    def corrupt(self, batch: Batch, epoch: int) -> Batch:
        """Add what `MaskedDiffusion.corrupt` adds, and block [B, L].

        With `complementary`, the tokens of the second copy have t = max(1 - t, eps), and the weight of that t.
        """
        batch = super().corrupt(batch, epoch)
        batch["block"] = batch["position_ids"] // self.length_at(batch)
        if self.config.complementary:
            masked = batch["maskable"] & ~batch["masked"]
            batch["t"] = torch.where(masked, (1 - batch["t"]).clamp(min=self.config.eps), batch["t"])
            settings = self.config.time_reweighting, self.config.cart_p
            batch["weights"] += time_weights(batch["t"], masked, batch["attention_mask"].bool(), *settings)
        return batch

    def times(self, row: Batch, rng: np.random.Generator) -> Tensor:
        """[L] one t a block. Stratified draws cover its range evenly within the row, and over the rows of the batch."""
        block = row["position_ids"] // self.length_at(row)
        blocks = block[row["maskable"]].unique()
        uniforms = self.stratify(rng.random(max(len(blocks), 1)), row)
        if self.config.t_sampler != "uniform":
            uniforms = (rng.permutation(len(uniforms)) + uniforms) / len(uniforms)
        times = torch.tensor([self.time(uniform) for uniform in uniforms], dtype=torch.float64)
        return times[torch.searchsorted(blocks, block).clamp(max=len(times) - 1)]

    def time(self, uniform: float) -> float:
        if self.config.mask_ratio is None:
            return super().time(uniform)
        low, high = self.config.mask_ratio
        return low + (high - low) * uniform

    def masked_copies(self, batch: Batch) -> Tensor:
        """[B, noised, L] bool, the tokens that each noised copy masks."""
        masked = batch["masked"]
        return torch.stack([masked, batch["maskable"] & ~masked][: self.noised], dim=1)

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """See `MaskedDiffusion.metrics`. Only times that cover [eps, 1) bound the likelihood."""
        found = super().metrics(sums)
        if self.config.mask_ratio is not None:
            found = {name: value for name, value in found.items() if name not in ("elbo", "perplexity_bound")}
        return found

    def positions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        row, _, column = self.masked_copies(batch).nonzero(as_tuple=True)
        return row, column

    def tokens(self, batch: Batch) -> Tensor:
        return self.noised * super().tokens(batch)

    def denominator(self, batch: Batch) -> Tensor:
        """See `MaskedDiffusion.denominator`; over all noised copies."""
        match self.config.loss_norm:
            case "masked" if self.noised > 1:  # their t are even: no importance
                return self.masked_copies(batch).sum().double()
            case "sequence":
                return self.noised * super().denominator(batch)
        return super().denominator(batch)

    def computed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        needed = needed_positions(batch, self.masked_copies(batch))
        lengths = highest(batch["position_ids"], documents(batch)) + 1
        seen = ((batch["block"] + 1) * self.length_at(batch)).minimum(lengths)  # all before the end of the block
        return needed.sum(), (needed * seen[:, None]).sum()

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Σ weight·token loss over the masked tokens of the noised copies."""
        canvas = side_by_side(batch, self.masked_copies(batch))
        where = tuple(to_device(index, model.device) for index in canvas.masked.nonzero(as_tuple=True))
        masked = to_device(canvas.masked, model.device)
        x_0, weights, position_ids = (
            to_device(canvas.take(batch[name]), model.device) for name in ("input_ids", "weights", "position_ids")
        )
        x_t = torch.where(masked, self.mask_token_id, x_0)
        seen = {"position_ids": position_ids, "visibility": canvas.visibility, "where": where}
        return model(x_t, x_0, masked, weights, token_loss=self.config.token_loss, **seen)
