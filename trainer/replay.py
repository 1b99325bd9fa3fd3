"""A step that was not finite, row by row: `python -m trainer.replay FILE [CHECKPOINT]`."""

import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from data.loader import Batch
from data.terminal import Parser, ending_in_one_line, table
from diffllm import DiffLLM
from diffllm.loss import focal_of
from trainer.config import Config
from trainer.distributed import Distributed
from trainer.export import load_trained
from trainer.forward import forward
from trainer.manifest import check_whole
from trainer.nonfinite import FailedStep
from trainer.schema import resolve


def replay(file: Path, checkpoint: Path | None = None) -> list[dict[str, float]]:
    """Run a failed step's rows again, each alone, with the parameters of the step before.

    Returns:
        A dict a row: sample_index, t, masked, loss, largest_nll and grad_norm.

    Raises:
        ValueError: no such file, or no whole checkpoint.
    """
    failed = FailedStep.read(file)
    checkpoint = checkpoint or Path(failed.checkpoint)
    try:
        check_whole(checkpoint)
    except ValueError as error:
        raise ValueError(f"{error}. Name another: python -m trainer.replay {file} CHECKPOINT") from error
    config = resolve(OmegaConf.create(failed.config))
    model = load_trained(checkpoint, config)[0].to(failed.dtype)
    return [_run(model, row, failed.norm, config) for batch in failed.micro_batches for row in _rows(batch)]


def _rows(batch: Batch) -> list[Batch]:
    return [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(len(batch["input_ids"]))]


def _run(model: DiffLLM, row: Batch, norm: float, config: Config) -> dict[str, float]:
    model.zero_grad()
    restored = forward(model, row, Distributed(0, 1, torch.device("cpu")), focal_of(config.diffusion))
    loss = restored.loss / norm
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return {
        "sample_index": int(row["sample_index"]),
        "t": float(row["t"]),
        "masked": int(row["masked"].sum()),
        "loss": float(loss.detach()),
        "largest_nll": float(restored.nll.amax()) if len(restored.nll) else 0.0,
        "grad_norm": float(torch.nn.utils.get_total_norm(gradients)),
    }


def main(arguments: list[str]) -> None:
    parser = Parser("trainer.replay", __doc__)
    parser.add_argument("file", type=Path, help="as named by the error of the failed step")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="default: the run's checkpoint before that step")
    with ending_in_one_line():
        options = parser.parse_args(arguments)
        rows = replay(options.file, options.checkpoint)
        print(table([rows[0], *(row.values() for row in rows)]))


if __name__ == "__main__":
    main(sys.argv[1:])
