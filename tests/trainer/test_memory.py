"""Memory of a rank: what does not fit is refused, and a lack of it names what helps."""

import pytest
import torch

from data import BatchLayout
from diffllm import ModelConfig
from launch.cli import user_errors
from tests.conftest import GOLDEN
from tests.trainer.runs import train
from trainer.build import load_for_sampling
from trainer.config import Config
from trainer.distributed import Distributed
from trainer.fsdp_sft_trainer import FSDPSFTTrainer
from trainer.memory import check_gathers, check_memory, remedies, state_memory


def test_state_of_each_rank(small_model):
    config = Config()
    count = sum(parameter.numel() for parameter in small_model.parameters())
    alone, shared = (state_memory(small_model, config, ranks, torch.device("cpu")) for ranks in (1, 4))
    assert (alone.weights, alone.gradients, alone.optimizer) == (4 * count, 4 * count, 8 * count)
    assert shared.weights == alone.weights // 4
    config.trainer.replicate = 2
    assert state_memory(small_model, config, 4, torch.device("cpu")).weights == alone.weights // 2


def test_a_world_that_shrank_below_what_fits(small_model, monkeypatch):
    monkeypatch.setattr("trainer.memory.device_memory", lambda device: 2**20)
    check_memory(small_model, Config(), Distributed(0, 64, torch.device("cpu")))
    words = (
        r"does not fit: with ranks=1 weights, gradients and optimizer need .* which has 0\.0\. What helps: .*more GPUs"
    )
    with pytest.raises(ValueError, match=words):
        check_memory(small_model, Config(), Distributed(0, 1, torch.device("cpu")))


def test_a_model_that_no_rank_can_hold_whole_is_not_sampled(small_model, monkeypatch):
    config, distributed = Config(), Distributed(0, 64, torch.device("cpu"))
    config.trainer.val_samples = 2
    whole = 4 * sum(parameter.numel() for parameter in small_model.parameters())
    monkeypatch.setattr("trainer.memory.device_memory", lambda device: whole * 67 // 64)
    check_gathers(small_model, config, distributed)  # beside it a 64th of weights and two moments
    monkeypatch.setattr("trainer.memory.device_memory", lambda device: whole * 66 // 64)
    with pytest.raises(ValueError, match=r"trainer\.val_samples=2: .* GiB of "):
        check_gathers(small_model, config, distributed)


def test_out_of_memory_names_what_helps(small_run, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore on this")

    monkeypatch.setattr(FSDPSFTTrainer, "compute_loss", full)
    words = (
        r"^out of memory\. What helps: data\.micro_batch_size_per_gpu=4, model\.enable_gradient_checkpointing=true, "
    )
    with pytest.raises(
        MemoryError, match=words + r".*more GPUs, .* \(CUDA out of memory\. Tried to allocate 2 GiB\.\)$"
    ):
        train(small_run())


def test_a_smaller_micro_batch_divides_the_batch_and_keeps_it():
    config = Config()
    layout = BatchLayout(rank=0, ranks=2, micro_batch_size=6, micro_batches=2)
    keeping = "data.micro_batch_size_per_gpu={} data.gradient_accumulation_steps={}"
    assert remedies(config, layout)[0] == keeping.format(3, 4)
    assert remedies(config, layout, largest=5)[0] == keeping.format(4, 3)
    assert not any("micro_batch_size" in setting for setting in remedies(config, layout, largest=0))
    config.data.train_batch_size = 24
    assert remedies(config, layout, largest=2)[0] == "data.micro_batch_size_per_gpu=2"


def test_what_a_single_row_can_still_give_up():
    config = Config(model=ModelConfig(enable_gradient_checkpointing=True, recompute="selective"))
    layout = BatchLayout(rank=0, ranks=1, micro_batch_size=1, micro_batches=4)
    assert {"model.recompute=full", "data.max_length=1024"} <= {*remedies(config, layout)}


def test_out_of_memory_ends_a_command_in_one_line(capsys):
    with pytest.raises(SystemExit, match="1"), user_errors(debug=False):
        raise MemoryError("out of memory. What helps: more GPUs")
    assert capsys.readouterr().err == "error: out of memory. What helps: more GPUs\n"


def test_heads_that_varlen_cannot_take(small_run):
    shape = {"model__hidden_size": 40, "model__num_attention_heads": 2, "trainer__max_steps": 1}
    with pytest.raises(ValueError, match=r"attn_implementation=varlen: .* not a multiple of 8 .*; use auto or sdpa"):
        train(small_run("varlen", model__attn_implementation="varlen", **shape))
    train(small_run("auto", model__attn_implementation="auto", **shape))


def test_weights_that_a_gpu_cannot_hold_are_not_read(monkeypatch):
    monkeypatch.setattr("trainer.build.device_memory", lambda _: 2**10)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("trainer.build.build_model", None)
    config = Config(model=ModelConfig(path=str(GOLDEN / "dream_tiny")))
    with pytest.raises(ValueError, match=r"does not fit: the weights need 0\.0 GiB, and a GPU has 0\.0\. Use a GPU"):
        load_for_sampling(config, torch.device("cuda"))
