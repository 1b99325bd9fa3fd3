"""Models written as published checkpoints: safetensors, config.json, generation_config.json, code and tokenizer."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from diffllm.tokenizer import save_tokenizer

if TYPE_CHECKING:
    from diffllm.modeling_diffllm import DiffLLM


def write_checkpoint(
    model: "DiffLLM",
    directory: str | Path,
    state_dict: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_size: str,
) -> None:
    """Write a model; see `DiffLLM.save_pretrained`."""
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    published = {
        model.family.published_name(name.removeprefix("lm.")): _alone(tensor)
        for name, tensor in state_dict.items()
        if not (model.lm.config.tie_word_embeddings and name == "lm.lm_head.weight")
    }
    save_torch_state_dict(published, directory, max_shard_size=max_shard_size)
    for file in directory.glob("*.safetensors"):
        file.chmod(0o644)  # the library leaves them readable by their owner alone
    dtype = str(next(iter(published.values())).dtype).removeprefix("torch.")
    for name, content in (("config.json", config_json(model, dtype)), (GENERATION_CONFIG_NAME, generation_json(model))):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    if "auto_map" in model.published and model.source.name is not None:
        copy_code(Path(model.source.name), directory)
    if tokenizer is not None:
        save_tokenizer(tokenizer, directory)


def config_json(model: "DiffLLM", dtype: str) -> dict[str, Any]:
    """The published config with the keys of Transformers 4, which ignores newer ones without an error."""
    old = {"torch_dtype": dtype} if "torch_dtype" in model.published else {}
    rope = model.lm.config.to_dict().get("rope_parameters") or {}
    if "full_attention" in rope:  # each kind of layer has its own
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if "rope_theta" in rope:
        old["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            old["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {**model.published, **old, "dtype": dtype}


def generation_json(model: "DiffLLM") -> dict[str, Any]:
    """The source's generation settings with this model's tokens, and no cache: later tokens change earlier states."""
    settings = {name: value for name, value in model.generation.items() if name != "cache_implementation"}
    tokens = {
        "bos_token_id": model.published.get("bos_token_id"),
        "eos_token_id": model.ends if len(model.ends) > 1 else model.eos_token_id,
        "pad_token_id": model.pad_token_id,
    }
    named = {name: token for name, token in tokens.items() if token is not None}
    return settings | {"use_cache": False} | named


def copy_code(source: Path, directory: Path) -> None:
    """Copy the Python files of a local checkpoint: its `auto_map` names some, and those import others."""
    if source.is_dir() and source.resolve() != directory.resolve():
        for file in source.glob("*.py"):
            shutil.copy(file, directory)


def _alone(tensor: Tensor) -> Tensor:
    """Contiguous, and alone in its memory: rows that do not divide by the ranks are gathered with padding behind."""
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.contiguous() if alone else tensor.clone(memory_format=torch.contiguous_format)
