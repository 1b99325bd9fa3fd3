"""Models of published shapes with random weights, on the device that is there."""

from dataclasses import fields, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from diffllm import DiffLLM, ModelConfig, new_model
from diffllm.loading import fill_buffers
from diffllm.tokenizer import builtin_tokenizer
from launch.shapes import SHAPES as PUBLISHED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def published_shape(name: str) -> ModelConfig:
    """Shape of a checkpoint on the hub; embedding and head are matrices of their own, as in Dream-7B."""
    published, known = OmegaConf.load(PUBLISHED)[name], {field.name for field in fields(ModelConfig)}
    return ModelConfig(**{key: published[key] for key in known & {*published} - {"tie_word_embeddings"}})


SHAPES = {
    "tiny": ModelConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=2000),
    "0.5b": published_shape("Qwen/Qwen2.5-0.5B"),
    "7b": published_shape("Dream-org/Dream-v0-Base-7B"),
}


@torch.no_grad()
def random_model(shape: str, attention: str = "sdpa", deviation: float = 0.02) -> DiffLLM:
    """A model of a shape."""
    config = replace(SHAPES[shape], attn_implementation=attention, max_position_embeddings=32_768)
    with torch.device("meta"):
        model = new_model(config, builtin_tokenizer()).to(DTYPE)
    fill_buffers(model.lm)
    model._apply(lambda tensor: torch.empty_like(tensor, device=DEVICE) if tensor.is_meta else tensor.to(DEVICE))
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, deviation, generator=generator)
        else:
            parameter.fill_("norm" in name)
    model.unnamed_ids = ()  # the published procedures sample tokens without a name
    return model.requires_grad_()


def write_checkpoint(shape: str, directory: Path) -> Path:
    """A checkpoint of a shape with random weights and the built-in tokenizer."""
    random_model(shape).save_pretrained(directory / shape, tokenizer=builtin_tokenizer())
    return directory / shape
