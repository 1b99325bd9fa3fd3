"""Run a non-finite step again, row by row: `python -m trainer.replay FILE [CHECKPOINT]`."""

import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from data.batches import Batch
from data.packing import single_rows
from data.terminal import Parser, ending_in_one_line, table
from diffllm import DiffLLM
from diffllm.diffusion import Objective, build_objective
from trainer.export import load_trained
from trainer.manifest import check_whole
from trainer.nonfinite import FailedStep
from trainer.schema import resolve


def replay(file: Path, checkpoint: Path | None = None) -> list[dict[str, float]]:
    """Run the rows of a failed step again, one by one, with the parameters before the step.

    Returns:
        One dict per row: sample_index, t if the objective has it, masked, loss, largest_nll and grad_norm.

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
    objective = build_objective(config.diffusion, model.mask_token_id, config.seed)
    return [
        _run(model, objective, row, failed.denominator) for batch in failed.micro_batches for row in single_rows(batch)
    ]


def _run(model: DiffLLM, objective: Objective, row: Batch, denominator: float) -> dict[str, float]:
    model.zero_grad()
    output = objective.loss(model, row)
    loss = output.loss / denominator
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return {
        "sample_index": int(row["sample_index"]),
        **({"t": float(row["t"].amax())} if "t" in row else {}),  # not every objective has times
        "masked": len(objective.positions(row)[0]),
        "loss": float(loss.detach()),
        "largest_nll": float(output.nll.amax()) if len(output.nll) else 0.0,
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
