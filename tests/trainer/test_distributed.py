"""The device and the ranks of this process."""

import platform

import pytest
import torch

from trainer import distributed
from trainer.distributed import check_alone, device_name


def test_a_processor_is_named_by_its_model_where_linux_tells_it(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "CPUINFO", tmp_path / "cpuinfo")
    assert device_name(torch.device("cpu")) == platform.machine()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\n\nmodel name\t: A CPU @ 2 GHz\n")
    assert device_name(torch.device("cpu")) == "A CPU @ 2 GHz"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    assert device_name(torch.device("cpu")) == platform.machine()


def test_several_ranks_are_refused(monkeypatch):
    check_alone("it", "python it.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"it is for one rank, torchrun has started 2: .*`python it\.py …`"):
        check_alone("it", "python it.py")
