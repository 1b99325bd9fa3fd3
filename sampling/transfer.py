"""Copies to the model's device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor without waiting for the GPU: a copy from memory that is not pinned would wait for its stream."""
    if tensor.device.type == "cpu" != device.type:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
