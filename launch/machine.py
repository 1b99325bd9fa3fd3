"""GPUs that a run is planned for, from the command line, this machine or a data sheet."""

import math
from dataclasses import dataclass, field, fields
from functools import partial
from textwrap import fill

import torch

from trainer.distributed import GIB
from trainer.speed import GPUS, find_gpu

DEFAULT = "h100"


def _explained(default: float | None, text: str):
    return field(default=default, metadata={"help": text})


_derived = partial(_explained, None)


@dataclass(frozen=True)
class Machine:
    """GPUs to plan for, as given on the command line. What is None is derived by `complete`.

    Raises:
        ValueError: a value outside its range, or an unknown `gpu`.
    """

    gpu: str | None = _derived(f"one of {', '.join(GPUS)}; by default this machine's, else {DEFAULT}")
    gpus: int | None = _derived("number of GPUs; by default this machine's if gpu= is left out, else 1")
    gpu_memory: float | None = _derived("GiB of each; by default those of the data sheet")
    tflops: float | None = _derived("peak of each in dense bf16, in TFLOP/s; by default that of the data sheet")
    mfu: float = _explained(0.4, "share of that peak that a step reaches (perf/mfu of a run); default 0.4")

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "gpu" and value is not None and not 0 < value < math.inf:
                raise ValueError(f"{item.name}={value}: must be a positive number")
        if self.mfu > 1:
            raise ValueError(f"mfu={self.mfu}: must be in (0, 1]")
        if self.gpu is not None and self.gpu not in GPUS:
            raise ValueError(f"gpu={self.gpu}: choose one of {', '.join(GPUS)}, or give gpu_memory= and tflops=")


@dataclass(frozen=True)
class Gpus:
    """GPUs to plan for, with their source in words."""

    count: int
    memory: float  # bytes of each
    tflops: float
    mfu: float
    source: str

    @property
    def flops(self) -> float:
        """FLOP/s of all GPUs at the given MFU."""
        return self.count * self.tflops * 1e12 * self.mfu


def complete(machine: Machine) -> Gpus:
    """Derive what is not given: from the data sheet of `gpu`, else from this machine's GPUs, else from an H100's.

    Raises:
        ValueError: this machine's GPU has no data sheet in `trainer.speed`, and no `tflops` is given.
    """
    count, name, memory = 1, machine.gpu, None
    if name is not None:
        source = f"gpu={name}"
    elif torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        count, name, memory = torch.cuda.device_count(), find_gpu(device.name), device.total_memory / GIB
        source = f"this machine's {device.name}"
        if name is None and machine.tflops is None:
            raise ValueError(f"{source}: no data sheet is known; give its peak in bf16 as tflops=, or another gpu=")
    else:
        name, source = DEFAULT, f"gpu={DEFAULT}, assumed since none is given and this machine has none"
    sheet = GPUS.get(name)
    return Gpus(
        count=machine.gpus or count,
        memory=(machine.gpu_memory or memory or sheet.memory) * GIB,
        tflops=machine.tflops or sheet.tflops,
        mfu=machine.mfu,
        source=source,
    )


def explanations() -> str:
    """Each setting with its meaning, as indented lines."""
    lines = (f"  {item.name:<12}{item.metadata['help']}" for item in fields(Machine))
    return "\n".join(fill(line, 100, subsequent_indent=" " * 14, break_on_hyphens=False) for line in lines)
