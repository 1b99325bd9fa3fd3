"""How fast a run is, and how much of the machine it uses."""

import resource
import time

import torch

from diffllm import DiffLLM
from trainer.distributed import Distributed

# Dense bf16 TFLOP/s of the data sheets, by a part of the device's name.
DATA_SHEET = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362}


class Speed:
    """Turns the counts of a step and its duration into the `perf/` metrics."""

    def __init__(self, model: DiffLLM, distributed: Distributed, dtype: torch.dtype, peak_tflops: float | None):
        config = model.lm.config
        self.distributed = distributed
        self.peak = peak_tflops or _data_sheet(distributed.device, dtype) or measured_tflops(distributed.device, dtype)
        self.per_token = sum(_flops(weight) for weight in model.lm.get_decoder().layers.parameters())
        self.per_masked = _flops(model.lm.lm_head.weight)
        # Scores and sums of values, two products of 2·L²·D forward and twice that backward, in every layer.
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.per_pair = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim

    def metrics(self, counts: dict[str, float], seconds: float, waited: float) -> dict[str, float]:
        """
        Args:
            counts: of the step over all ranks: row_tokens, attended, pairs (Σ L² over the rows) and masked.
            seconds: of the step, the wait included.
            waited: seconds of it in which this rank waited for data.

        Returns:
            tokens_per_second: without padding. mfu: model FLOPs utilisation (arXiv 2204.02311, appendix B); recomputed
            activations do not count. data_wait: share of the step. memory_gib: highest so far, of rank 0.
        """
        flops = (
            self.per_token * counts["attended"] + self.per_pair * counts["pairs"] + self.per_masked * counts["masked"]
        )
        return {
            "perf/tokens_per_second": counts["row_tokens"] / seconds,
            "perf/step_seconds": seconds,
            "perf/mfu": flops / seconds / (self.peak * 1e12 * self.distributed.size),
            "perf/data_wait": waited / seconds,
            "perf/memory_gib": _peak_memory(self.distributed.device) / 2**30,
        }


def _flops(weight: torch.Tensor) -> int:
    """A weight's FLOPs a token: 2 forward, 2 for the gradient of its input, 2 for its own unless it is frozen."""
    return (6 if weight.requires_grad else 4) * weight.numel()


def _data_sheet(device: torch.device, dtype: torch.dtype) -> float | None:
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops for part, tflops in DATA_SHEET.items() if part in name), None)


def measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """What a product of two square matrices reaches, the best of five."""
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        (matrix @ matrix).sum().item()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds) / 1e12


def _peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
