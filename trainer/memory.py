"""Bytes of weights, gradients and optimizer state on a rank, from the shapes of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from data import BatchLayout
from data.storage import first_line
from diffllm import DiffLLM
from diffllm.quantize import NF4_BYTES, numel
from trainer.build import compute_dtype, frozen_dtype, muon_matrices
from trainer.config import Config, batch_layout
from trainer.distributed import GIB, Distributed, device_memory

MORE_GPUS = "more GPUs"


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
    trained = sum(numel(p) for p in model.parameters() if p.requires_grad)
    frozen = sum(numel(p) for p in model.parameters() if not p.requires_grad)
    moment = 1 if config.optim.name == "adamw_8bit" else 4
    once = sum(map(numel, muon_matrices(model))) if config.optim.name == "muon" else 0  # momentum alone
    layer = sum(numel(p) for p in layers[0].parameters())
    root = trained + frozen - layer * len(layers)
    # Embedding, head and final norm stay gathered, and two layers at a time: the current one and the next.
    held = layer * (2 if config.trainer.reshard_after_forward else len(layers))
    root_trained = 0 if config.model.lora_rank else root
    computed = compute_dtype(config, device).itemsize
    packed = 0
    if config.model.quantize == "nf4":  # whole on every rank, and not gathered
        matrices = len(layers) * sum(numel(p) for p in layers[0].parameters() if p.ndim > 1 and not p.requires_grad)
        frozen -= matrices
        packed = round(NF4_BYTES * matrices)
        held -= held * matrices // (layer * len(layers))
    if ranks == 1 and config.model.lora_rank and not config.trainer.cpu_offload:  # frozen weights are not gathered
        root, held = 0, held * trained // (trained + frozen)
    return StateMemory(
        weights=(4 * trained + frozen_dtype(config, device).itemsize * frozen) // shards + packed,
        gradients=4 * trained // shards,
        optimizer=moment * (2 * trained - once) // shards,
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
        ValueError: the message gives the memory needed and available, and what helps.
    """
    device = torch.device("cpu") if config.trainer.cpu_offload else distributed.device
    layout = batch_layout(config.data, distributed.rank, distributed.size)
    state = state_memory(model, config, distributed.size, distributed.device)
    needed = state.total
    if config.trainer.cpu_offload:  # gathered weights and accumulated gradients stay on the GPU
        needed -= state.gathered
    else:
        whole = whole_gradients(model, config, layout)
        needed += max(0, whole - state.gradients)
    available = device_memory(device)
    if needed > available:
        raise ValueError(
            f"does not fit: with ranks={distributed.size} weights, gradients and optimizer need {needed / GIB:.1f} GiB "
            f"on each rank, which has {available / GIB:.1f}. What helps: {', '.join(remedies(config, layout))}"
        )


@contextmanager
def naming_remedies(config: Config, layout: BatchLayout) -> Iterator[None]:
    """Let an error of memory name the settings that need less.

    Raises:
        MemoryError: the block ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        helps = ", ".join(remedies(config, layout))
        raise MemoryError(f"out of memory. What helps: {helps} ({first_line(error)})") from error


def remedies(config: Config, layout: BatchLayout, largest: int | None = None) -> list[str]:
    """Settings that may need less memory than those of the run. They keep the rows of an optimizer step.

    Args:
        largest: micro-batch that is known to fit, 0 if none; by default half of the run's is named.
    """
    limit = layout.micro_batch_size // 2 if largest is None else min(largest, layout.micro_batch_size - 1)
    rank_rows = layout.micro_batch_size * layout.micro_batches
    rows = max((n for n in range(1, limit + 1) if rank_rows % n == 0), default=0)
    derived = config.data.train_batch_size is not None and config.data.gradient_accumulation_steps is None
    accumulation = "" if derived or not rows else f" data.gradient_accumulation_steps={rank_rows // rows}"
    checkpointing = config.model.enable_gradient_checkpointing
    settings = {
        f"data.micro_batch_size_per_gpu={rows}{accumulation}": rows,
        "model.enable_gradient_checkpointing=true": not checkpointing,
        "model.recompute=full": checkpointing and config.model.recompute != "full",
        "trainer.reduce_each_micro_batch=true": layout.micro_batches > 1 and not config.trainer.reduce_each_micro_batch,
        "trainer.reshard_after_forward=true": not config.trainer.reshard_after_forward,
        MORE_GPUS: True,
        "optim.name=adamw_8bit trainer.async_checkpoints=false": config.optim.name == "adamw",
        "model.lora_rank=16 optim.lr=1e-4": not config.model.lora_rank,
        "model.quantize=nf4": config.model.lora_rank and config.model.quantize == "none",
        "trainer.cpu_offload=true": not config.trainer.cpu_offload,
        f"data.max_length={config.data.max_length // 2}": config.data.max_length > 1 and layout.micro_batch_size == 1,
    }
    return [setting for setting, helps in settings.items() if helps]


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
