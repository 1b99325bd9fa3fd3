"""Next-token prediction: the baseline of diffusion, with the same decoder, rows and batches."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from data import Batch
from diffllm.attention import visibility_of
from diffllm.diffusion.loss import LossOutput
from diffllm.diffusion.objective import Objective, ObjectiveConfig
from sampling import to_device


@dataclass
class CausalConfig(ObjectiveConfig):
    """Cross entropy of the response tokens, each predicted from the tokens before it.

    Raises:
        ValueError: attention that would not stay causal.
    """

    causal: ClassVar[bool] = True
    loss_share: ClassVar[float] = 1.0
    objective: str = "causal"

    @property
    def attention(self) -> str:
        return "a position sees itself and earlier ones"

    def __post_init__(self) -> None:
        super().__post_init__()
        if steps := self.attention_annealing_steps:
            raise ValueError(
                f"diffusion.attention_annealing_steps={steps}: the objective causal never sees later tokens; set it to "
                "0, or choose diffusion=elbo"
            )


class Causal(Objective):
    """Predicts each response token from the tokens before it. Nothing is masked, and nothing is drawn."""

    settings = CausalConfig
    config: CausalConfig

    def corrupt(self, batch: Batch, epoch: int) -> Batch:
        """Add x_t, the clean tokens; masked, all response tokens; and block [B, L], one a token."""
        return {
            **batch,
            "x_t": batch["input_ids"],
            "masked": batch["maskable"],
            "block": batch["position_ids"],  # a position sees its own block and earlier ones
        }

    def denominator(self, batch: Batch) -> Tensor:
        """Number of response tokens, a float64 scalar."""
        return batch["masked"].sum().double()

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Σ nll of the response tokens."""
        device = model.device
        x_0, masked, position_ids = (to_device(batch[name], device) for name in ("input_ids", "masked", "position_ids"))
        where = tuple(to_device(index, device) for index in self.positions(batch))
        seen = {"position_ids": position_ids, "visibility": replace(visibility_of(batch), causal=True), "where": where}
        return model(x_0, x_0, masked, masked.float(), **seen)

    def measure(self, batch: Batch, output: LossOutput) -> Tensor:
        """[3] Σ nll, Σ correct, response tokens."""
        sums = torch.zeros(3, dtype=torch.float64, device=output.nll.device)
        sums[0], sums[1] = output.nll.double().sum(), output.correct.sum()
        sums[2].fill_(len(output.nll))  # the host's number in the kernel: `sums[2] = …` copies, and waits
        return sums

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Means over the response tokens; none without any.

        Returns:
            nll: nats a token, exact; `elbo` of masked diffusion bounds the same quantity.
            perplexity: exp(nll).
            accuracy: share of tokens that are the most likely one.
        """
        nll, correct, tokens = sums
        if not tokens:
            return {}
        mean = nll / tokens
        return {"nll": mean, "perplexity": math.exp(min(mean, 700)), "accuracy": correct / tokens}
