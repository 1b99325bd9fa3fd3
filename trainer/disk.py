"""Bytes that a run writes."""

import math
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from diffllm import DiffLLM
from diffllm.lora import base_name
from diffllm.quantize import numel
from trainer.build import export_dtype
from trainer.config import Config
from trainer.memory import state_memory


class Disk(NamedTuple):
    """Bytes that a run writes, beside its small files."""

    checkpoint: int
    kept: int  # checkpoints at the end
    most: int  # checkpoints at once: one more during a save
    export: int

    @property
    def total(self) -> int:
        return self.checkpoint * self.most + self.export


def disk(model: DiffLLM, config: Config, steps: int | None, device: torch.device) -> Disk:
    """Checkpoints, with trained weights in float32 and two moments, and the export.

    Args:
        model: may be on the meta device.
        steps: of the run; None for so many that old checkpoints are deleted, as with `trainer.keep_best`.
        device: of the run.
    """
    settings = config.trainer
    state, most = state_memory(model, config, 1, device), settings.keep_checkpoints + settings.keep_best
    if settings.keep_best or (steps is None and settings.save_checkpoint_steps is not None):
        saves = most + 1
    else:
        saves = 1 if settings.save_checkpoint_steps is None else math.ceil(steps / settings.save_checkpoint_steps)
    exported = sum(numel(weight) for name, weight in model.named_parameters() if base_name(name) is not None)
    return Disk(
        checkpoint=state.gradients + state.optimizer,  # gradients are as large as the weights that they train
        kept=min(saves, most) * settings.save_checkpoints,
        most=min(saves, most + 1) * settings.save_checkpoints,
        export=export_dtype(config, model.source).itemsize * exported * settings.save_model,
    )


def free_space(directory: Path) -> tuple[int, int]:
    """Free bytes of the disk that a run's directory is on, or will be, and those of earlier files that it replaces."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    present = sum(file.stat().st_size for part in ("checkpoints/*", "hf") for file in directory.glob(f"{part}/*"))
    return shutil.disk_usage(existing).free, present
