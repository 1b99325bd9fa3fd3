"""Export a checkpoint's model in the published format: `python -m trainer.export CHECKPOINT DIR [bf16|f32]`."""

import sys
from pathlib import Path

from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from data.storage import whole_directory
from data.terminal import Parser, ending_in_one_line, printable
from diffllm import DiffLLM
from diffllm.lora import add_lora, merge_lora
from trainer import checkpoint
from trainer.build import EXPORT_DTYPES, build_model, export_dtype, recommendation
from trainer.config import Config
from trainer.manifest import check_whole, read_manifest
from trainer.schema import resolve


def load_trained(source: Path, config: Config) -> tuple[DiffLLM, PreTrainedTokenizerBase]:
    """The unsharded model of a checkpoint, with adapters unmerged, in one process without ranks.

    Adapters that were trained beside 4-bit weights stand beside those that were quantized.
    """
    config.model.quantize = "none"
    model, tokenizer = build_model(config.model, config.seed)
    model.block_length = config.diffusion.block_length
    if config.model.lora_rank:
        add_lora(model, config.model, config.seed)
    trained = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    checkpoint.load_weights(source, trained)
    return model, tokenizer


def export(source: Path, directory: Path, dtype: str | None = None) -> None:
    """Write safetensors, config, generation config and tokenizer; adapters are merged.

    Args:
        dtype: of the weights, as `trainer.export_dtype`, which is the default.

    Raises:
        ValueError: `source` is not a whole checkpoint, `directory` exists, or an unknown `dtype`.
    """
    if dtype not in (None, *EXPORT_DTYPES):
        raise ValueError(f"dtype={dtype}: weights are written as one of {', '.join(EXPORT_DTYPES)}")
    check_whole(source)
    config = resolve(OmegaConf.create(read_manifest(source)["config"]))
    config.model.attn_implementation = "sdpa"  # nothing is forwarded
    config.trainer.export_dtype = dtype or config.trainer.export_dtype
    with whole_directory(directory) as unfinished:
        model, tokenizer = load_trained(source, config)
        rounded = export_dtype(config, model.source)
        merged = merge_lora(model.state_dict(), config.model)
        weights = {name: tensor.to(rounded) for name, tensor in merged.items()}
        settings = {"sampling": recommendation(config), "causal": config.diffusion.causal}
        model.save_pretrained(unfinished, weights, tokenizer, **settings)


def main(arguments: list[str]) -> None:
    parser = Parser("trainer.export", __doc__)
    parser.add_argument("checkpoint", type=Path, help="a directory such as outputs/NAME/checkpoints/step_00000200")
    parser.add_argument("directory", type=Path, help="of the export; must not exist")
    parser.add_argument("dtype", nargs="?", help="of the weights: f32 or bf16; default: the run's trainer.export_dtype")
    with ending_in_one_line():
        options = parser.parse_args(arguments)
        export(options.checkpoint, options.directory, options.dtype)
        print(printable(f"model: {options.directory}"))


if __name__ == "__main__":
    main(sys.argv[1:])
