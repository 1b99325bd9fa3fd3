"""Write models as published checkpoints: safetensors, config.json, generation_config.json, code and tokenizer."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from diffllm.checkpoint_source import CheckpointSource
from diffllm.generation_config import generation_json
from diffllm.tokenizer import save_tokenizer
from sampling import SamplingConfig


def write_checkpoint(
    directory: str | Path,
    state_dict: Mapping[str, Tensor],
    source: CheckpointSource,
    config: PreTrainedConfig,
    tokens: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_size: str,
    sampling: SamplingConfig | None = None,
    causal: bool = False,
) -> None:
    """Write a model in the published format of its source.

    Args:
        state_dict: full tensors by their names in `DiffLLM`.
        config: of the decoder.
        tokens: special tokens for generation_config.json; None values are left out.
        max_shard_size: of one file; several files have an index.
        sampling: settings for generation_config.json.
        causal: write the format of Transformers' causal models instead.
    """
    source = source.as_causal() if causal else source
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        source.family.published_name(name.removeprefix("lm.")): _alone(tensor)
        for name, tensor in state_dict.items()
        if not (config.tie_word_embeddings and name == "lm.lm_head.weight")
    }
    save_torch_state_dict(weights, directory, max_shard_size=max_shard_size)
    for file in directory.glob("*.safetensors"):
        file.chmod(0o644)  # the library leaves them readable by their owner alone
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    for name, content in (
        ("config.json", config_json(source.published, config, dtype)),
        (GENERATION_CONFIG_NAME, generation_json(source.generation, tokens, sampling, causal)),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    if "auto_map" in source.published and source.name is not None:
        copy_code(Path(source.name), directory)
    if tokenizer is not None:
        save_tokenizer(tokenizer, directory)


def config_json(published: dict[str, Any], config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
    """The published config with the keys of Transformers 4, which ignores newer keys without an error."""
    old = {"torch_dtype": dtype} if "torch_dtype" in published else {}
    rope = config.to_dict().get("rope_parameters") or {}
    if "full_attention" in rope:  # layer types have their own
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if "rope_theta" in rope:
        old["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            old["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {**published, **old, "dtype": dtype}


def copy_code(source: Path, directory: Path) -> None:
    """Copy all Python files of a local checkpoint: those of its `auto_map` import others."""
    if source.is_dir() and source.resolve() != directory.resolve():
        for file in source.glob("*.py"):
            shutil.copy(file, directory)


def _alone(tensor: Tensor) -> Tensor:
    """A contiguous tensor alone in its storage. Gathered tensors may have padding behind them."""
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.contiguous() if alone else tensor.clone(memory_format=torch.contiguous_format)
