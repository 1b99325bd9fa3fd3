"""FSDP2 training: optimizer, checkpoints, metrics and the loop."""

from pathlib import Path
from typing import TYPE_CHECKING

import data.terminal  # noqa: F401 — first: see its docstring

if TYPE_CHECKING:
    from trainer.config import Config


def train(config: "Config") -> Path:
    """Train as this process's rank of torchrun, or alone. Return the directory of the run.

    Raises:
        ValueError: settings, rows and model do not fit together; the message says what to change.
    """
    from omegaconf import OmegaConf  # these take seconds, which not every module of the package needs

    from trainer.distributed import init_distributed
    from trainer.fsdp_sft_trainer import FSDPSFTTrainer
    from trainer.schema import resolve

    config = resolve(OmegaConf.structured(config))
    with init_distributed() as distributed:
        FSDPSFTTrainer(config, distributed).fit()
    return Path(config.trainer.output_dir)
