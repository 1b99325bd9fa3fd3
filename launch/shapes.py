"""Models without weights, from the shape of a checkpoint: its own config.json, or shapes.yaml."""

from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from diffllm import DiffLLM, ModelConfig, new_model
from diffllm.adapt import with_mask
from diffllm.checkpoint_source import CheckpointSource
from diffllm.families import family_of
from diffllm.gguf import is_gguf
from diffllm.loading import empty_model
from diffllm.lora import add_lora
from diffllm.tokenizer import MASK_TOKEN, builtin_tokenizer
from trainer.build import check_length
from trainer.config import Config

SHAPES = Path(__file__).with_name("shapes.yaml")
UNREAD_IDS = {"mask_token_id": 0, "eos_token_id": 1}  # a model must have them, a plan does not use them


def meta_model(config: Config, choice: str) -> tuple[DiffLLM, str]:
    """The model on the meta device, and the file with its shape.

    Raises:
        ValueError: no file has the shape, or the context is shorter than data.max_length.
    """
    attention = "sdpa"  # FlashAttention keeps the same tensors, and may not be installed
    if config.model.path is None:
        file = f"conf/model/{choice}.yaml"
        with torch.device("meta"):
            model = new_model(replace(config.model, attn_implementation=attention), builtin_tokenizer())
    else:
        source, file = _source(config.model)
        model = empty_model(source, attn_implementation=attention)
    if config.model.lora_rank:
        add_lora(model, config.model, config.seed)
    check_length(config.data, model.lm.config.max_position_embeddings)
    return model, file


def _source(config: ModelConfig) -> tuple[CheckpointSource, str]:
    """The checkpoint of `model.path`, adapted if causal, and the file with its shape: its own, or SHAPES.

    Raises:
        ValueError: neither has it, nor the hub.
    """
    path, shapes = Path(config.path), OmegaConf.to_object(OmegaConf.load(SHAPES))
    if not path.exists() and config.path in shapes:
        published = shapes[config.path] | UNREAD_IDS
        return CheckpointSource(None, published, family_of(published, config.path)), f"launch/{SHAPES.name}"
    try:
        source = CheckpointSource.open(config.path)
    except ValueError as error:
        if path.exists() or is_gguf(config.path):
            raise
        raise ValueError(f"{error}, or choose a shape of launch/{SHAPES.name}: {', '.join(shapes)}") from error
    file = config.path if path.is_file() else f"{config.path}/config.json"
    return with_mask(source, config.mask_token or MASK_TOKEN)[0] if source.is_autoregressive else source, file
