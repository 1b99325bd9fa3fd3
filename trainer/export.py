"""A checkpoint's model in the published format: `python -m trainer.export CHECKPOINT DIR`."""

import sys
from pathlib import Path

import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf

from trainer import checkpoint
from trainer.build import build_model
from trainer.config import resolve


def export(source: Path, directory: Path) -> None:
    """Write safetensors, config, generation config and tokenizer; one process, no ranks needed.

    Raises:
        ValueError: `source` is not a whole checkpoint.
    """
    if defect := checkpoint.find_defect(source):
        raise ValueError(f"{source}: {defect}")
    config = resolve(OmegaConf.create(checkpoint.read_manifest(source)["config"]))
    model, tokenizer = build_model(config.model, config.seed)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=source, no_dist=True)
    model.save_pretrained(directory, state["model"], tokenizer)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m trainer.export CHECKPOINT DIR")
    try:
        export(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
