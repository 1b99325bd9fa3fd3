"""GPUs to plan for: from a data sheet, from this machine, or assumed."""

from types import SimpleNamespace

import pytest
import torch

from launch.machine import Machine, complete
from trainer.distributed import GIB
from trainer.speed import GPUS


@pytest.fixture
def four_gpus(monkeypatch):
    """A machine with four GPUs of a name."""

    def install(name: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        device = SimpleNamespace(name=name, total_memory=20 * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)

    return install


def test_a_data_sheet():
    gpus = complete(Machine(gpu="4090"))
    assert (gpus.count, gpus.memory, gpus.tflops) == (1, 24 * GIB, 165)
    assert gpus.flops == pytest.approx(0.4 * 165e12)
    gpus = complete(Machine(gpu="4090", gpus=2, gpu_memory=20, tflops=100, mfu=0.5))
    assert (gpus.count, gpus.memory, gpus.flops) == (2, 20 * GIB, 2 * 0.5 * 100e12)


def test_without_a_gpu_an_h100_is_assumed_and_named():
    gpus = complete(Machine())
    assert (gpus.count, gpus.memory, gpus.tflops) == (1, 80 * GIB, GPUS["h100"].tflops)
    assert "h100, assumed" in gpus.source


def test_this_machine(four_gpus):
    four_gpus("NVIDIA RTX A6000")
    gpus = complete(Machine())
    assert (gpus.count, gpus.memory, gpus.tflops) == (4, 20 * GIB, GPUS["a6000"].tflops)
    assert "NVIDIA RTX A6000" in gpus.source
    assert complete(Machine(gpu="h200")).count == 1


def test_a_gpu_without_a_data_sheet(four_gpus):
    four_gpus("Some GPU")
    with pytest.raises(ValueError, match=r"Some GPU: .*tflops="):
        complete(Machine())
    assert complete(Machine(tflops=50)).tflops == 50
