"""Time of a run, from its settings and the shapes of its model."""

import math
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import torch

from data import BatchLayout
from data.curation import subset
from data.errors import BadRows
from data.files import iterate, outline
from data.tasks import tasks_of
from data.tasks.base import Task
from data.tasks.generated import GeneratedTask
from diffllm import DiffLLM
from launch.machine import Gpus
from trainer.build import compute_dtype
from trainer.config import Config
from trainer.distributed import Distributed
from trainer.memory import state_memory
from trainer.speed import Speed

CUDA = torch.device("cuda")
PCIE = 25e9  # bytes a second from host to GPU and back: PCIe 4.0 ×16
# Seconds a layer and micro-batch at least: kernels are launched one by one. A forward of 28 layers took 23 ms on an
# H200, a backward about twice as long.
LAUNCHES = 2.5e-3
HOST_ADAMW = 5e-10  # seconds a weight of fused AdamW in the host, one thread of an AMD EPYC


class StepTime(NamedTuple):
    """Seconds of an optimizer step."""

    compute: float
    offload: float  # of trainer.cpu_offload
    is_launching: bool  # the launches of kernels take longer than their FLOPs

    @property
    def total(self) -> float:
        """Without overlap."""
        return self.compute + self.offload


def step_time(model: DiffLLM, config: Config, layout: BatchLayout, gpus: Gpus) -> StepTime:
    """Time of a step whose rows have data.max_length tokens, `loss_share` of them in the loss."""
    length, tokens = config.data.max_length, layout.global_batch_size * config.data.max_length
    alone, copies = Distributed(0, gpus.count, torch.device("cpu")), config.diffusion.copies
    speed = Speed(model, alone, compute_dtype(config, CUDA), gpus.tflops)
    pairs = tokens * length * (1 if copies == 1 else copies / 2)  # by blocks a position sees half of the row on average
    in_loss = tokens * config.diffusion.loss_share
    counts = {"row_tokens": tokens, "computed": copies * tokens, "pairs": pairs, "in_loss": in_loss}
    offload = _offload(model, config, layout) if config.trainer.cpu_offload else 0.0
    launches = LAUNCHES * model.lm.config.num_hidden_layers * layout.micro_batches
    computing = speed.flops(counts) / gpus.flops
    return StepTime(max(computing, launches), offload, launches > computing)


def _offload(model: DiffLLM, config: Config, layout: BatchLayout) -> float:
    """Seconds of a step for weights to the GPU in forward and backward pass, gradients back, and AdamW on one host."""
    state = state_memory(model, config, layout.ranks, CUDA)
    gathers = layout.micro_batches * (2 if config.trainer.reshard_after_forward else 1)
    reductions = layout.micro_batches if config.trainer.reduce_each_micro_batch else 1
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    updates = HOST_ADAMW * trained * config.trainer.replicate
    return (gathers * state.weights + reductions * state.gradients) / PCIE + updates


def count_rows(config: Config) -> int | None:
    """Rows of an epoch, none of them dropped by a rule; None if some are not on this machine.

    Raises:
        ValueError: unreadable files, or more rows in `data.subset` than there are.
    """
    if files := config.data.train_files:
        counts = [_count(name) for name in files]
    else:
        counts = [_count_of_task(task) for task in tasks_of(config.data, config.task)]
    if None in counts:
        return None
    rows = sum(counts)
    if config.data.val_split and not config.data.val_files:
        rows -= min(math.ceil(config.data.val_split * rows), rows - 1)
    return rows if config.data.subset is None else len(subset(rows, config.data.subset, config.seed))


def _count_of_task(task: Task) -> int | None:
    """Training rows of a task; None if they are not here."""
    if isinstance(task, GeneratedTask):
        return task.settings.train_rows
    return _count(task.file_of("train")) if task.hub_id else sum(1 for _ in task.rows("train"))


def _count(name: str) -> int | None:
    """Rows of a file or folder; of .jsonl the lines, of Parquet by its metadata. None for what is not here."""
    folder, colon, _ = name.rpartition(":")  # of a split
    if not Path(name).exists() and not (colon and Path(folder).is_dir()):
        return None
    files = [Path(file) for file, *_ in outline(name)]
    if {file.suffix.lower() for file in files} <= {".jsonl", ".parquet"}:
        return sum(map(_count_file, files))
    return sum(1 for _ in iterate(name, BadRows()))


def _count_file(file: Path) -> int:
    if file.suffix.lower() == ".parquet":
        return pq.read_metadata(file).num_rows
    with file.open("rb") as lines:
        return sum(not line.isspace() for line in lines)


def count_steps(config: Config, layout: BatchLayout, rows: int | None) -> int | None:
    """Steps of the run; None if neither `trainer.max_steps` nor `rows` is known.

    Raises:
        ValueError: fewer rows than a global batch.
    """
    if config.trainer.max_steps or rows is None:
        return config.trainer.max_steps or None
    if rows < layout.global_batch_size:
        raise ValueError(
            f"data.train_batch_size={layout.global_batch_size}: more than the {rows} training rows; lower it"
        )
    return config.trainer.total_epochs * (rows // layout.global_batch_size)
