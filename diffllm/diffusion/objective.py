"""The protocol of an objective: noise rows, compute a loss, measure.

Trainer, loader, validation and metrics know this protocol alone. To add an objective, write a file with a subclass of
`ObjectiveConfig` and one of `Objective` into this package: its name becomes a choice of the group `diffusion`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from data import Batch
from data.errors import nearest
from data.packing import row_lengths
from data.settings import check_fields, setting
from diffllm.diffusion.loss import LossOutput


@dataclass
class ObjectiveConfig:
    """Settings that every objective has.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    causal: ClassVar[bool] = False  # whether tokens see earlier ones only: the model is exported as a causal decoder
    block_length: ClassVar[int | None] = None  # positions of a block of attention; None: attention is not by blocks
    copies: ClassVar[int] = 1  # x_0 and its noised copies, side by side in a forward; 1: the noised row alone
    loss_share: ClassVar[float] = 0.5  # share of the response tokens in the loss of a step, on average
    objective: str = setting("")  # its name
    # steps over which a causal model's attention becomes bidirectional; 0: bidirectional from the start
    attention_annealing_steps: int = setting(0, at_least=0)

    def __post_init__(self) -> None:
        check_fields(self, "diffusion")

    @property
    def attention(self) -> str:
        """Text that says what a position sees, for the lines before a run."""
        if steps := self.attention_annealing_steps:
            return f"from earlier positions to all within {steps:,} steps"
        return "all positions see each other"

    @property
    def settles(self) -> tuple[str, int]:
        """The setting by which the attention of a run changes, and the steps until it is that of sampling."""
        return "attention_annealing_steps", self.attention_annealing_steps


class Objective(ABC):
    """Noises rows and computes a loss for them.

    `corrupt` runs on the host. It adds x_t [B, L], masked [B, L] bool, the positions of the loss, and all that `loss`
    and `measure` read. It may add document or block [B, L], which limit attention (`diffllm.attention.visibility_of`).

    Args:
        seed: keys the noise.
    """

    settings: ClassVar[type[ObjectiveConfig]]

    def __init__(self, config: Any, mask_token_id: int, seed: int):
        self.config, self.mask_token_id, self.seed = config, mask_token_id, seed

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "settings" not in vars(cls) or not (name := cls.settings.objective):
            raise TypeError(f"{cls.__name__}: give it settings of its own, with the name of the objective")
        if name in OBJECTIVES:
            raise TypeError(f"{cls.__name__}: objective={name} is {OBJECTIVES[name].__name__}; choose another name")
        OBJECTIVES[name] = cls

    def for_validation(self, seed: int) -> "Objective":
        """Objective for validation, with its own noise."""
        return type(self)(self.config, self.mask_token_id, seed)

    @abstractmethod
    def corrupt(self, batch: Batch, epoch: int) -> Batch:
        """Noise a batch in a loader worker, as a pure function of the seed, the epoch and the batch's fields.

        A row's noise may depend on its place in the global batch, but never on rank, worker or micro-batch.

        Args:
            batch: input_ids, maskable (bool), attention_mask and position_ids [B, L]; sample_index [B]; slot [B], the
                row's place in the global batch; batch_size [B], rows of the global batch; in training also repeat [B],
                how often the row occurred earlier in the epoch, and step [B], the steps before this one.
        """

    def positions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows and columns [N] of the tokens in the loss of a corrupted batch, in its order."""
        return batch["masked"].nonzero(as_tuple=True)

    def computed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Count the positions that the decoder computes for a corrupted batch, and the pairs in its attention."""
        lengths = row_lengths(batch)
        return lengths.sum(), lengths.square().sum()

    @abstractmethod
    def denominator(self, batch: Batch) -> Tensor:
        """The batch's part of the step's loss denominator, a float64 scalar; parts add up."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Σ weight·token loss of a corrupted batch, not yet divided by the step's denominator.

        Args:
            model: a `DiffLLM`; tokens, positions and weights must be on its device.
            batch: on the host.
        """

    @abstractmethod
    def measure(self, batch: Batch, output: LossOutput) -> Tensor:
        """[K] float64 sums over a batch, on the output's device; they add up over batches and ranks."""

    @abstractmethod
    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Metrics by name from the sums of `measure`, none if nothing was measured.

        The first one judges a model: lower is better.
        """


OBJECTIVES: dict[str, type[Objective]] = {}


def settings_of(objective: str) -> type[ObjectiveConfig]:
    """The settings of an objective.

    Raises:
        ValueError: no objective has this name.
    """
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        hint = nearest(str(objective), list(OBJECTIVES))
        raise ValueError(f"diffusion.objective={objective}: no such objective; {hint}")
    return OBJECTIVES[objective].settings


def build_objective(config: ObjectiveConfig, mask_token_id: int, seed: int) -> Objective:
    """The objective of the settings."""
    return OBJECTIVES[config.objective](config, mask_token_id, seed)
