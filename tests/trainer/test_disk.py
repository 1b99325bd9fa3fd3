"""Bytes that a run writes."""

import pytest
import torch

from diffllm.lora import add_lora
from tests.conftest import small_shape
from tests.trainer.runs import newest
from trainer.config import Config
from trainer.disk import disk
from trainer.manifest import read_manifest

CPU = torch.device("cpu")


def test_disk_is_what_a_run_writes(default_run, small_run, small_model):
    written = disk(small_model, small_run(), 12, CPU)
    files = read_manifest(newest(default_run))["files"]
    tensors = sum(file["bytes"] for name, file in files.items() if name.endswith(".distcp"))
    assert written.checkpoint == pytest.approx(tensors, rel=0.15)
    assert written.export == pytest.approx((default_run / "hf" / "model.safetensors").stat().st_size, rel=0.05)


@pytest.mark.parametrize(
    ("interval", "steps", "kept", "most"),
    [(None, None, 1, 1), (5, None, 2, 3), (5, 20, 2, 3), (5, 10, 2, 2), (5, 4, 1, 1)],
)
def test_checkpoints_on_the_disk(small_model, interval, steps, kept, most):
    config = Config(model=small_shape())
    config.trainer.save_checkpoint_steps = interval
    written = disk(small_model, config, steps, CPU)
    assert (written.kept, written.most) == (kept, most)
    assert written.total == most * written.checkpoint + written.export


def test_what_is_not_saved_takes_no_room(small_model):
    config = Config(model=small_shape())
    config.trainer.save_checkpoint_steps, config.trainer.keep_best = 5, True
    assert disk(small_model, config, 12, CPU)[1:3] == (3, 4)
    config.trainer.keep_best = config.trainer.save_checkpoints = config.trainer.save_model = False
    assert disk(small_model, config, None, CPU).total == 0


def test_adapters_alone_are_saved_and_the_whole_model_is_exported(small_model):
    config = Config(model=small_shape(lora_rank=8))
    parameters = sum(parameter.numel() for parameter in small_model.parameters())
    add_lora(small_model, config.model, seed=0)
    adapters = sum(parameter.numel() for parameter in small_model.parameters() if parameter.requires_grad)
    written = disk(small_model, config, 1, CPU)
    assert (written.checkpoint, written.export) == (12 * adapters, 4 * parameters)
