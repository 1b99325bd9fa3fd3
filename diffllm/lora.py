"""LoRA (arXiv 2106.09685) through peft: train low-rank matrices beside frozen weights, and merge them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffllm.config import ModelConfig
from diffllm.modeling_diffllm import DiffLLM

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora(model: DiffLLM, config: ModelConfig, seed: int) -> None:
    """Freeze the model and add adapters to its linear layers, drawn from `seed`. No output changes before training.

    Raises:
        ValueError: peft is not installed, or `model.target_modules` names no linear layer of the decoder.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ValueError("model.lora_rank needs peft: pip install 'diffllm[lora]'") from error

    decoder = model.lm.get_decoder()
    linear = {name.rsplit(".")[-1] for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)}
    chosen = linear if config.target_modules == ["all-linear"] else set(config.target_modules)
    if unknown := chosen - linear:
        raise ValueError(
            f"model.target_modules=[{','.join(config.target_modules)}]: no linear layer is called "
            f"{', '.join(sorted(unknown))}; choose all-linear or from {', '.join(sorted(linear))}"
        )
    model.requires_grad_(False)
    settings = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, decoder)
        for layer in decoder.modules():
            if isinstance(layer, LoraLayer):
                for part in (layer.lora_A, layer.lora_B):  # peft puts them on meta, in bf16, like the weights
                    part.to_empty(device="cpu").float()
                layer.reset_lora_parameters("default", init_lora_weights=True)


def base_name(name: str) -> str | None:
    """Name of a parameter in the model without adapters; None for an adapter's."""
    return None if ".lora_" in name else name.replace(_BASE, ".")


def merge_lora(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Merge the full tensors of a model with adapters: W + alpha/rank · B·A."""
    merged = {}
    for name, tensor in state_dict.items():
        if (plain := base_name(name)) is None:
            continue
        layer, base, _ = name.rpartition(f"{_BASE}weight")
        if base:
            delta = state_dict[layer + _B].float() @ state_dict[layer + _A].float()
            tensor = (tensor.float() + config.lora_alpha / config.lora_rank * delta).to(tensor.dtype)
        merged[plain] = tensor
    return merged
