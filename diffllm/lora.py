"""LoRA (arXiv 2106.09685) through peft: train low-rank matrices beside frozen weights, merge, write and read them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.storage import first_line
from diffllm.config import ModelConfig
from diffllm.modeling_diffllm import DiffLLM

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
FILE = "adapter_model.safetensors"
_PEFT = "base_model.model."  # begins the names in PEFT's files
# Settings of PEFT that change more than B·A beside a weight, and their values that do not.
PLAIN = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (None,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "fan_in_fan_out": (False,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base
}


def add_lora(model: DiffLLM, config: ModelConfig, seed: int) -> None:
    """Freeze the model and add adapters to its linear layers, drawn from `seed`. No output changes before training.

    Raises:
        ValueError: peft is not installed, or `model.target_modules` names no linear layer of the decoder.
    """
    peft = _peft("model.lora_rank")
    decoder = model.lm.get_decoder()
    linear = {name.rsplit(".")[-1] for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)}
    chosen = linear if config.target_modules == ["all-linear"] else set(config.target_modules)
    if unknown := chosen - linear:
        raise ValueError(
            f"model.target_modules=[{','.join(config.target_modules)}]: no linear layer is called "
            f"{', '.join(sorted(unknown))}; choose all-linear or from {', '.join(sorted(linear))}"
        )
    model.requires_grad_(False)
    settings = peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, decoder)
        for layer in decoder.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                for part in (layer.lora_A, layer.lora_B):  # peft puts them on meta, in bf16, like the weights
                    part.to_empty(device="cpu").float()
                layer.reset_lora_parameters("default", init_lora_weights=True)


def _peft(setting: str) -> Any:
    """The package peft.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{setting} needs peft: pip install 'diffllm[lora]'") from error
    return peft


def base_name(name: str) -> str | None:
    """Name of a parameter in the model without adapters; None for an adapter's."""
    return None if ".lora_" in name else name.replace(_BASE, ".")


def merge_lora(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Merge the full tensors of a model with adapters: W + alpha/rank · B·A, in float32."""
    merged = {}
    for name, tensor in state_dict.items():
        if (plain := base_name(name)) is None:
            continue
        layer, base, _ = name.rpartition(f"{_BASE}weight")
        if base:
            delta = state_dict[layer + _B].float() @ state_dict[layer + _A].float()
            tensor = tensor.float() + config.lora_alpha / config.lora_rank * delta
        merged[plain] = tensor
    return merged


def write_adapter(
    directory: Path, state_dict: Mapping[str, Tensor], config: ModelConfig, block_length: int | None = None
) -> None:
    """Write the adapters of a model in PEFT's files, for the model of Transformers that `import diffllm` registers.

    Args:
        state_dict: full tensors by their names in `DiffLLM`.
        block_length: of the attention that they were trained for, kept in the metadata of the tensors.
    """
    adapters = {name: tensor for name, tensor in state_dict.items() if base_name(name) is None}
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in adapters})
    settings = _peft("model.lora_rank").LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        base_model_name_or_path=config.path,
        inference_mode=True,
    )
    directory.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(directory)
    named = {_PEFT + name.removeprefix("lm.").replace(".default.", "."): value for name, value in adapters.items()}
    tensors = {name: tensor.contiguous() for name, tensor in named.items()}
    save_file(tensors, directory / FILE, metadata={"block_length": str(block_length or 0)})


@torch.no_grad()
def load_adapter(model: DiffLLM, config: ModelConfig) -> None:
    """Load the adapter of `model.adapter`: into the adapters of `add_lora` if there are some, else into the weights.

    Raises:
        ValueError: no LoRA adapter, one of a kind that is not supported, or one of another model.
    """
    adapter, rank, scale = _read_adapter(config)
    weights, layers = dict(model.named_parameters()), {key.rpartition(".lora_")[0] for key in adapter}
    found = {key: tuple(tensor.shape) for key, tensor in adapter.items()}
    if config.lora_rank:
        shapes = {name: tuple(weight.shape) for name, weight in weights.items() if base_name(name) is None}
        expected = {name.removeprefix("lm.").replace(".default.", "."): shape for name, shape in shapes.items()}
    else:
        plain = {layer: weights[f"lm.{layer}.weight"].shape for layer in layers if f"lm.{layer}.weight" in weights}
        expected = {f"{layer}.lora_A.weight": (rank, shape[-1]) for layer, shape in plain.items()}
        expected |= {f"{layer}.lora_B.weight": (shape[0], rank) for layer, shape in plain.items()}
    if wrong := sorted({key for key, _ in found.items() ^ expected.items()}):
        raise ValueError(
            f"model.adapter={config.adapter}: does not belong beside this model: {', '.join(wrong[:3])}; give its own "
            "base, and its model.target_modules to train it further"
        )
    for layer in layers:
        a, b = (adapter[f"{layer}.lora_{part}.weight"] for part in "AB")
        if config.lora_rank:
            weights[f"lm.{layer}{_A}"].copy_(a)
            weights[f"lm.{layer}{_B}"].copy_(b)
        else:
            weight = weights[f"lm.{layer}.weight"]
            weight.copy_(weight.float() + scale * (b.float() @ a.float()))
    with safe_open(Path(config.adapter) / FILE, "pt") as file:
        length = (file.metadata() or {}).get("block_length")
    if length is not None:  # written by `write_adapter`
        model.block_length = int(length) or None


def _read_adapter(config: ModelConfig) -> tuple[dict[str, Tensor], int, float]:
    """Tensors of an adapter by their names in the model of Transformers, its rank and its scale.

    Raises:
        ValueError: see `load_adapter`.
    """
    peft, name = _peft("model.adapter"), f"model.adapter={config.adapter}"
    for file in ("adapter_config.json", FILE):
        if not (Path(config.adapter) / file).is_file():
            raise ValueError(f"{name}: no {file} there; give the directory of a LoRA adapter in PEFT's files")
    try:
        settings = peft.PeftConfig.from_pretrained(config.adapter)
        weights = load_file(Path(config.adapter) / FILE)
    except Exception as error:  # neither library checks its files
        raise ValueError(f"{name}: cannot be read ({first_line(error)})") from error
    if settings.peft_type != "LORA":
        raise ValueError(f"{name}: its peft_type is {settings.peft_type}; only LORA can be loaded")
    if other := [key for key, values in PLAIN.items() if getattr(settings, key) not in values]:
        raise ValueError(f"{name}: {', '.join(f'{key}={getattr(settings, key)}' for key in other)} is not supported")
    rank, alpha = settings.r, settings.lora_alpha
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ValueError(
            f"{name}: adapter_config.json has r={rank!r} and lora_alpha={alpha!r}: must be positive numbers"
        )
    if config.lora_rank and (rank, alpha, settings.use_rslora) != (config.lora_rank, config.lora_alpha, False):
        raise ValueError(
            f"{name}: to train it further give its model.lora_rank={rank} and model.lora_alpha={alpha}; "
            "model.lora_rank=0 merges it"
        )
    adapter = {key.removeprefix(_PEFT): tensor for key, tensor in weights.items()}
    if not adapter or not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in adapter.values()):
        raise ValueError(f"{name}: its tensors are missing, or not finite numbers")
    return adapter, rank, alpha / (math.sqrt(rank) if settings.use_rslora else rank)
