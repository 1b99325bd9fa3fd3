"""4-bit base weights beside adapters (QLoRA, arXiv 2305.14314), through bitsandbytes."""

from typing import Any

import torch
from torch import nn

from diffllm.modeling_diffllm import DiffLLM

# Bytes of a weight: 4 bits, an 8-bit scale for 64 weights, a float32 scale for 256 of these.
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


def quantize(model: DiffLLM, device: torch.device) -> None:
    """Replace the linear layers of the decoder by layers of 4-bit NormalFloat weights on a device, one by one.

    Embedding, head and norms stay as they are. A forward dequantises a layer's weight to the dtype that it had.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError("model.quantize=nf4 needs bitsandbytes: pip install 'diffllm[quantize]'") from error
    decoder = model.lm.get_decoder()
    for layer in decoder.layers:
        linear = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        for name, module in linear.items():
            layer.set_submodule(name, _quantized(module, bitsandbytes, device))
    decoder.is_loaded_in_4bit = True  # peft then makes adapters for such layers


def _quantized(module: nn.Linear, bitsandbytes: Any, device: torch.device) -> nn.Linear:
    size, dtype, biased = (module.in_features, module.out_features), module.weight.dtype, module.bias is not None
    with torch.device("meta"):
        quantized = bitsandbytes.nn.Linear4bit(*size, bias=biased, compute_dtype=dtype, quant_type="nf4")
    settings = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": True}
    quantized.weight = bitsandbytes.nn.Params4bit(module.weight.data, **settings).to(device)
    quantized.bias = module.bias
    return quantized


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a weight holds packed 4-bit values."""
    return hasattr(tensor, "quant_state")


def numel(parameter: nn.Parameter) -> int:
    """Number of weights in a parameter; packed ones are two in a byte."""
    return parameter.numel() * (2 if is_quantized(parameter) else 1)
