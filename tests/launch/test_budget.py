"""Rows, steps and time of a run."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from data.config import TaskConfig
from data.tasks.equations import Equations
from diffllm import new_model
from diffllm.diffusion.block import BlockConfig
from diffllm.tokenizer import builtin_tokenizer
from launch.budget import count_rows, count_steps, step_time
from launch.machine import Machine, complete
from tests.conftest import small_shape
from trainer.config import Config, batch_layout
from trainer.distributed import Distributed
from trainer.speed import Speed

ROW = {"question": "2+2?", "answer": "4"}


def files_of(*names: str, subset: float | None = None) -> Config:
    config = Config()
    config.data.train_files, config.data.subset = [*map(str, names)], subset
    return config


def test_rows_of_files_of_all_kinds(tmp_path):
    jsonl, parquet, listed, folder = (tmp_path / name for name in ("a.jsonl", "b.parquet", "c.json", "d"))
    jsonl.write_text(f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}")
    pq.write_table(pa.Table.from_pylist([ROW] * 3), parquet)
    listed.write_text(json.dumps([ROW] * 5))
    folder.mkdir()
    (folder / "train.jsonl").write_text(f"{json.dumps(ROW)}\n" * 7)
    (folder / "test.jsonl").write_text(f"{json.dumps(ROW)}\n")
    Dataset.from_list([ROW] * 11).save_to_disk(tmp_path / "saved")
    assert count_rows(files_of(jsonl, parquet)) == 5
    assert count_rows(files_of(listed)) == 5
    assert count_rows(files_of(f"{folder}:train")) == 7
    assert count_rows(files_of(tmp_path / "saved")) == 11
    assert count_rows(files_of(f"{folder}:train", subset=4)) == 4
    assert count_rows(files_of()) == len(Equations().rows("train"))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "openai/gsm8k", "openai/gsm8k/main:test"])
def test_rows_of_files_elsewhere_are_unknown(name):
    assert count_rows(files_of(name)) is None


def test_rows_of_tasks_are_neither_made_nor_downloaded(tmp_path):
    config = Config(task=TaskConfig(["countdown"], train_rows=10**9))
    assert count_rows(config) == 10**9
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(ROW)}\n" * 7)
    assert count_rows(Config(task=TaskConfig(["gsm8k"], {"gsm8k": str(tmp_path)}))) == 7
    assert count_rows(Config(task=TaskConfig(["equations", "math"]))) is None


def test_steps():
    config = Config()
    config.data.train_batch_size = 32
    layout = batch_layout(config.data, 0, 2)
    assert count_steps(config, layout, None) is None
    assert count_steps(config, layout, 1000) == 3 * 31
    with pytest.raises(ValueError, match=r"data\.train_batch_size=32: .* 31 "):
        count_steps(config, layout, 31)
    config.trainer.max_steps = 7
    assert count_steps(config, layout, None) == 7


@pytest.fixture
def large():
    """A model of 1.9 billion parameters on the meta device."""
    shape = small_shape(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, vocab_size=70_000)
    with torch.device("meta"):
        return new_model(replace(shape, num_attention_heads=16, num_key_value_heads=16), builtin_tokenizer())


def test_time_follows_flops(large):
    config, base = Config(model=small_shape()), Machine(gpu="h100")
    layout = batch_layout(config.data, 0, 1)
    seconds = step_time(large, config, layout, complete(base)).total
    for machine, factor in ((replace(base, mfu=0.2), 2), (Machine(gpu="a100-80"), 989 / 312)):
        assert step_time(large, config, layout, complete(machine)).total == pytest.approx(factor * seconds)
    shared = step_time(large, config, batch_layout(config.data, 0, 8), complete(replace(base, gpus=8)))
    assert shared.total == pytest.approx(seconds)  # a step has eight times as many rows
    config.data.max_length = 4
    assert step_time(large, config, layout, complete(base)).is_launching


def test_offloading_takes_time_for_transfers_and_the_update(large):
    config = Config(model=small_shape())
    config.trainer.cpu_offload = True
    config.data.train_batch_size, config.data.micro_batch_size_per_gpu = 8, 2
    parameters = sum(parameter.numel() for parameter in large.parameters())
    step = step_time(large, config, batch_layout(config.data, 0, 1), complete(Machine(gpu="h100")))
    assert step.offload == pytest.approx(4 * 3 * 4 * parameters / 25e9 + 5e-10 * parameters)
    assert step.total == step.compute + step.offload


def test_held_out_rows_are_not_trained_on(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(ROW)}\n" * 50)
    config = files_of(tmp_path / "a.jsonl")
    config.data.val_split = 0.1
    assert count_rows(config) == 45


@pytest.mark.parametrize("complementary", [False, True])
def test_a_step_by_blocks_computes_all_copies(large, complementary):
    """Of x_0 and its copies each position sees half of the row on average."""
    settings = {"t_sampler": "stratified", "complementary": complementary}
    masks, blocks = Config(), Config(diffusion=BlockConfig(**settings))
    masks.diffusion.t_sampler = "stratified"
    layout, machine = batch_layout(masks.data, 0, 1), complete(Machine(gpu="h100"))
    speed = Speed(large, Distributed(0, 1, torch.device("cpu")), torch.bfloat16, None)
    tokens, copies = layout.global_batch_size * masks.data.max_length, 3 if complementary else 2
    in_loss = tokens * (blocks.diffusion.loss_share - masks.diffusion.loss_share)
    decoder = (copies - 1) * tokens * speed.per_token + (
        copies / 2 - 1
    ) * tokens * masks.data.max_length * speed.per_pair
    seconds = [step_time(large, config, layout, machine).compute for config in (masks, blocks)]
    assert seconds[1] - seconds[0] == pytest.approx((decoder + in_loss * speed.per_loss_token) / machine.flops)
