"""Adapters under FSDP2: trained alone, saved alone, resumed, merged on export."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from diffllm import new_model
from tests.conftest import small_shape
from tests.trainer.runs import losses, newest, train, weights
from trainer.distributed import init_distributed
from trainer.export import export
from trainer.fsdp_sft_trainer import FSDPSFTTrainer
from trainer.manifest import read_manifest


@pytest.fixture
def pretrained(tmp_path, tokenizer):
    new_model(small_shape(), tokenizer, seed=3).save_pretrained(tmp_path / "pretrained", tokenizer=tokenizer)
    return tmp_path / "pretrained"


@pytest.fixture
def lora_run(small_run, pretrained):
    def configure(name="run", **changes):
        settings = {"model__path": str(pretrained), "model__lora_rank": 4, "trainer__save_checkpoint_steps": 6}
        return small_run(name, **settings | changes)

    return configure


def test_adapters_train_the_same_on_two_ranks_and_resume(lora_run, pretrained, train_on_two_ranks):
    alone = train(lora_run("alone"))
    assert losses(alone)[-1] < losses(alone)[0]
    train_on_two_ranks([lora_run("two"), lora_run("moved")])
    assert losses(alone.parent / "two") == pytest.approx(losses(alone), rel=1e-6)

    moved = alone.parent / "moved"
    shutil.rmtree(moved / "checkpoints" / "step_00000012")
    assert losses(train(lora_run("moved"))) == pytest.approx(losses(alone), rel=1e-6)
    shutil.copytree(alone, alone.parent / "copy")
    shutil.rmtree(alone.parent / "copy" / "checkpoints" / "step_00000012")
    again = train(lora_run("copy"))
    assert losses(again) == losses(alone)
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(alone).items())


@pytest.mark.parametrize("offloaded", [False, True])
def test_one_rank_copies_no_frozen_weight_unless_from_the_host(lora_run, offloaded):
    with init_distributed() as distributed:
        model = FSDPSFTTrainer(lora_run(trainer__cpu_offload=offloaded), distributed).model
    assert {parameter.requires_grad: isinstance(parameter, DTensor) for parameter in model.parameters()} == {
        True: True,
        False: offloaded,
    }


def test_checkpoints_hold_adapters_and_exports_hold_them_merged(lora_run, pretrained, tmp_path):
    run = train(lora_run())
    trained_last = newest(run)
    saved = sum(file["bytes"] for file in read_manifest(trained_last)["files"].values())
    assert saved < (pretrained / "model.safetensors").stat().st_size
    base, trained = load_file(pretrained / "model.safetensors"), weights(run)
    assert base.keys() == trained.keys()
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}
    export(trained_last, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in trained.items())
    assert json.loads((run / "hf" / "config.json").read_text())["model_type"] == "Dream"


def test_frozen_weights_beside_adapters_are_kept_in_what_they_are_computed_in(lora_run):
    run = train(lora_run(trainer__precision="bf16", trainer__max_steps=3))
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.bfloat16}


def test_adapters_go_on_only_with_their_weights(lora_run, pretrained, tmp_path):
    train(lora_run())
    shutil.copytree(pretrained, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other settings: model\.path was .*pretrained and is .*other"):
        train(lora_run(model__path=str(tmp_path / "other")))
