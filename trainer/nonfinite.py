"""Save the micro-batches of a step whose loss or gradient is not finite, for replay."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batches import Batch
from data.storage import whole_file
from trainer.distributed import Distributed


@dataclass
class FailedStep:
    """Micro-batches of one rank in a failed step, and the checkpoint with its parameters."""

    step: int
    rank: int
    denominator: float  # of the loss
    dtype: torch.dtype  # of the parameters in the forward
    micro_batches: list[Batch]
    config: dict[str, Any]
    checkpoint: str  # of the step before

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"step_{self.step:08d}_rank_{self.rank}.pt"
        with whole_file(path, "wb") as file:
            torch.save(asdict(self), file)
        return path

    @classmethod
    def read(cls, path: Path) -> "FailedStep":
        """Read a file of `write`. No code in the file runs.

        Raises:
            ValueError: no such file, or a file of another kind.
        """
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a run writes them to OUTPUT_DIR/nonfinite")
        try:
            content = torch.load(path, weights_only=True)
        except Exception as error:  # a broken file raises many kinds of error
            raise ValueError(f"{path} cannot be read as a step that was not finite: it is broken") from error
        names = {item.name for item in fields(cls)}
        if not isinstance(content, dict) or content.keys() != names:
            raise ValueError(f"{path} is no step that was not finite: it should hold {', '.join(sorted(names))}")
        return cls(**content)


def keep(failed: FailedStep, losses: list[Tensor], directory: Path, distributed: Distributed) -> str:
    """Write the micro-batches at fault, one file a rank. Collective.

    Args:
        failed: holds all micro-batches of this rank.
        losses: of each micro-batch. If all losses of all ranks are finite, the gradient is not: all micro-batches are
            written.

    Returns:
        The ranks, sample indices and files.
    """
    bad = [batch for batch, loss in zip(failed.micro_batches, losses, strict=True) if not loss.isfinite()]
    if any(distributed.gather(bool(bad))):
        failed.micro_batches = bad
    place = None
    if failed.micro_batches:
        samples = [index for batch in failed.micro_batches for index in batch["sample_index"].tolist()]
        place = f"rank {distributed.rank}, samples {samples}: {failed.write(directory)}"
    return "; ".join(place for place in distributed.gather(place) if place)
