"""Bytes of weights, gradients and optimizer state on a rank, from the shapes of a model."""

import os
from dataclasses import dataclass

import torch

from data import BatchLayout
from diffllm import DiffLLM
from trainer.build import compute_dtype, frozen_dtype
from trainer.config import Config, batch_layout
from trainer.distributed import Distributed

GIB = 2**30


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one rank."""

    weights: int  # its shard
    gradients: int
    optimizer: int
    gathered: int  # unsharded weights of one moment, and their gradients before reduction

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered


def state_memory(model: DiffLLM, config: Config, ranks: int, device: torch.device) -> StateMemory:
    """Memory of weights, gradients and optimizer on each of `ranks` ranks. The model may be on the meta device."""
    shards = max(1, ranks // config.trainer.replicate)
    layers = model.lm.get_decoder().layers
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    moment = 1 if config.optim.name == "adamw_8bit" else 4
    layer = sum(p.numel() for p in layers[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - layer * len(layers)
    # Embedding, head and final norm stay gathered, and two layers at a time: the current one and the next.
    held = layer * (2 if config.trainer.reshard_after_forward else len(layers))
    root_trained = 0 if config.model.lora_rank else root
    computed = compute_dtype(config, device).itemsize
    return StateMemory(
        weights=(4 * trained + frozen_dtype(config, device).itemsize * frozen) // shards,
        gradients=4 * trained // shards,
        optimizer=2 * moment * trained // shards,
        gathered=computed * (root + held + root_trained),
    )


def whole_gradients(model: DiffLLM, config: Config, layout: BatchLayout) -> int:
    """Bytes of unsharded float32 gradients, which a rank accumulates if they are reduced once a step."""
    if config.trainer.reduce_each_micro_batch or layout.micro_batches == 1:
        return 0
    return 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def check_memory(model: DiffLLM, config: Config, distributed: Distributed) -> None:
    """Refuse a run whose state exceeds a rank's memory.

    Raises:
        ValueError: the message gives the memory needed and available, and settings that help.
    """
    device = torch.device("cpu") if config.trainer.cpu_offload else distributed.device
    state = state_memory(model, config, distributed.size, distributed.device)
    needed = state.total
    if config.trainer.cpu_offload:  # gathered weights and accumulated gradients stay on the GPU
        needed -= state.gathered
    else:
        whole = whole_gradients(model, config, batch_layout(config.data, distributed.rank, distributed.size))
        needed += max(0, whole - state.gradients)
    available = device_memory(device)
    if needed > available:
        raise ValueError(
            f"ranks={distributed.size}: weights, gradients and optimizer need {needed / GIB:.1f} GiB on each rank, "
            f"which has {available / GIB:.1f}. Use more ranks, model.lora_rank, optim.name=adamw_8bit or "
            "trainer.cpu_offload=true"
        )


def check_gathers(model: DiffLLM, config: Config, distributed: Distributed) -> None:
    """Refuse validation samples if a rank cannot hold the whole model beside its shard of weights and optimizer.

    Raises:
        ValueError: the message gives the memory needed and available.
    """
    state = state_memory(model, config, distributed.size, distributed.device)
    beside = 0 if config.trainer.cpu_offload else state.weights + state.optimizer
    dtype = compute_dtype(config, distributed.device)
    needed = beside + dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    if needed > (available := device_memory(distributed.device)):
        raise ValueError(
            f"trainer.val_samples={config.trainer.val_samples}: to sample, each rank holds the whole model and needs "
            f"{needed / GIB:.1f} GiB of {available / GIB:.1f}; set it to 0"
        )


def device_memory(device: torch.device) -> int:
    """Bytes of a rank's memory: its GPU's, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
