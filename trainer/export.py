"""A checkpoint's model in the published format: `python -m trainer.export CHECKPOINT DIR`."""

import sys
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from diffllm import DiffLLM
from diffllm.lora import add_lora, merge_lora
from trainer import checkpoint
from trainer.build import build_model
from trainer.config import Config, resolve


def load_trained(source: Path, config: Config) -> tuple[DiffLLM, PreTrainedTokenizerBase]:
    """The whole model of a checkpoint, adapters beside their weights, in one process without ranks."""
    model, tokenizer = build_model(config.model, config.seed)
    if config.model.lora_rank:
        add_lora(model, config.model, config.seed)
    trained = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
        dcp.load({"model": trained}, checkpoint_id=source, no_dist=True)
    return model, tokenizer


def export(source: Path, directory: Path) -> None:
    """Write safetensors, config, generation config and tokenizer; adapters are merged.

    Raises:
        ValueError: `source` is not a whole checkpoint.
    """
    if defect := checkpoint.find_defect(source):
        raise ValueError(f"{source}: {defect}")
    config = resolve(OmegaConf.create(checkpoint.read_manifest(source)["config"]))
    model, tokenizer = load_trained(source, config)
    model.save_pretrained(directory, merge_lora(model.state_dict(), config.model), tokenizer)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m trainer.export CHECKPOINT DIR")
    try:
        export(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
