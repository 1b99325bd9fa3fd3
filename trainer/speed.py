"""Speed of a run: tokens per second, model FLOP/s utilisation, memory."""

import resource
from typing import NamedTuple

import torch

from diffllm import DiffLLM
from diffllm.quantize import numel
from trainer.distributed import Distributed


class DataSheet(NamedTuple):
    """A GPU by its vendor's data sheet."""

    memory: float  # GiB; of L4, L40 and L40S less the sixteenth that error correction takes
    tflops: float  # dense bf16 without sparsity, accumulated in float32


# By short names, from the vendors' data sheets and white papers. All parts of a short name, split at the hyphen, occur
# in the name that CUDA reports, and not in those of the GPUs behind it.
GPUS = {
    "3090": DataSheet(24, 71),
    "4090": DataSheet(24, 165),
    "5090": DataSheet(32, 210),
    "a6000": DataSheet(48, 155),
    "6000-ada": DataSheet(48, 364),
    "l40s": DataSheet(45, 362),
    "l40": DataSheet(45, 181),
    "l4": DataSheet(22.5, 121),
    "a100-40": DataSheet(40, 312),
    "a100-80": DataSheet(80, 312),
    "a100": DataSheet(40, 312),
    "h100-pcie": DataSheet(80, 756),
    "h100-nvl": DataSheet(94, 835),
    "h100": DataSheet(80, 989),
    "h200": DataSheet(141, 989),
    "b200": DataSheet(180, 2250),
}


def find_gpu(device_name: str) -> str | None:
    """Short name in GPUS of a GPU that CUDA calls `device_name`; None if it is not among them."""
    if "laptop" in device_name.lower():  # has less than the card of its name
        return None
    parts = ((name, name.split("-")) for name in GPUS)
    return next((name for name, found in parts if all(part in device_name.lower() for part in found)), None)


class Speed:
    """Computes the `perf/` metrics from the counts and duration of a step.

    Args:
        peak_tflops: peak of one device; None takes the data sheet's, if one is known for device and dtype.
    """

    def __init__(self, model: DiffLLM, distributed: Distributed, dtype: torch.dtype, peak_tflops: float | None):
        config = model.lm.config
        self.distributed = distributed
        self.peak = peak_tflops or _data_sheet(distributed.device, dtype)
        self.per_token = sum(_flops(weight) for weight in model.lm.get_decoder().layers.parameters())
        self.per_loss_token = _flops(model.lm.lm_head.weight)
        # Scores and weighted values, two products of 2·D each forward and twice that backward, in every layer.
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.per_pair = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim

    def metrics(self, counts: dict[str, float], seconds: float, waited: float) -> dict[str, float]:
        """Return the `perf/` metrics of a step.

        Args:
            counts: sums over all ranks: row_tokens, in_loss, and computed and pairs of `Objective.computed`.
            seconds: duration of the step.
            waited: seconds of them that this rank waited for data.

        Returns:
            tokens_per_second: without padding. data_wait: share of the step. memory_gib: rank 0's peak so far.
            mfu: see `flops`; absent without a known peak.
        """
        metrics = {
            "perf/tokens_per_second": counts["row_tokens"] / seconds,
            "perf/step_seconds": seconds,
            "perf/data_wait": waited / seconds,
            "perf/memory_gib": _peak_memory(self.distributed.device) / 2**30,
        }
        if self.peak is not None:
            metrics["perf/mfu"] = self.flops(counts) / seconds / (self.peak * 1e12 * self.distributed.size)
        return metrics

    def flops(self, counts: dict[str, float]) -> float:
        """FLOPs that the model needs for a step, recomputed activations not counted (arXiv 2204.02311, appendix B)."""
        in_decoder = self.per_token * counts["computed"] + self.per_pair * counts["pairs"]
        return in_decoder + self.per_loss_token * counts["in_loss"]


def _flops(weight: torch.Tensor) -> int:
    """FLOPs a token of one weight: 2 forward, 2 for its input's gradient, 2 for its own gradient unless frozen."""
    return (6 if weight.requires_grad else 4) * numel(weight)


def _data_sheet(device: torch.device, dtype: torch.dtype) -> float | None:
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = find_gpu(torch.cuda.get_device_name(device))
    return GPUS[name].tflops if name else None


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the GPU, or resident in a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
