"""Adapters under FSDP2: trained alone, saved alone, resumed, merged on export."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModel

from diffllm import load_model, new_model
from sampling import SamplingConfig
from tests.conftest import small_shape
from tests.trainer.runs import losses, newest, train, weights
from trainer.build import build_model, load_for_sampling
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
    with init_distributed() as distributed:
        model = FSDPSFTTrainer(lora_run(trainer__precision="bf16"), distributed).model
    assert {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()} == {
        (True, torch.float32),
        (False, torch.bfloat16),
    }


def test_adapters_go_on_only_with_their_weights(lora_run, pretrained, tmp_path):
    train(lora_run())
    shutil.copytree(pretrained, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other settings: model\.path was .*pretrained and is .*other"):
        train(lora_run(model__path=str(tmp_path / "other")))


def test_an_adapter_loads_in_peft_here_and_is_trained_further(lora_run, pretrained):
    """peft's model, ours with model.adapter, and the merged export have the same logits."""
    run = train(lora_run(model__lora_alpha=8.0))
    ids = torch.arange(24).reshape(2, 12)
    merged = load_model(run / "hf").logits(ids)
    base = AutoModel.from_pretrained(pretrained)
    assert (base(ids).logits - merged).abs().max() > 1e-4
    peft = PeftModel.from_pretrained(base, run / "hf_adapter")
    torch.testing.assert_close(peft(ids).logits, merged, rtol=1e-5, atol=1e-5)
    config = lora_run(model__lora_rank=0, model__adapter=str(run / "hf_adapter"))
    ours, _ = build_model(config.model)
    torch.testing.assert_close(ours.logits(ids), merged, rtol=1e-6, atol=1e-6)
    sampler, _ = load_for_sampling(lora_run(model__adapter=str(run / "hf_adapter")))  # whatever the rank
    torch.testing.assert_close(sampler.logits(ids), merged, rtol=1e-6, atol=1e-6)

    further = lora_run("further", model__lora_alpha=8.0, model__adapter=str(run / "hf_adapter"))
    assert losses(train(further))[0] < losses(run)[0]
    train(lora_run("merged", model__lora_rank=0, model__adapter=str(run / "hf_adapter"), trainer__max_steps=1))
    assert losses(run.parent / "merged")[0] == pytest.approx(losses(run.parent / "further")[0], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"peft_type": "IA3"}, "peft_type is .*IA3"),
        (None, r"no adapter_config\.json"),
        ({}, r"train it further give its model\.lora_rank=2"),
        ({"r": 0}, "r=0 .*: must be positive"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf: must be positive"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
    ],
)
def test_an_adapter_that_cannot_be_loaded(lora_run, tmp_path, change, message):
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 16.0, "target_modules": ["q_proj"]}
    if change is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter | change))
    save_file({}, tmp_path / "adapter_model.safetensors")
    with init_distributed() as distributed, pytest.raises(ValueError, match=rf"model\.adapter=.*{message}"):
        FSDPSFTTrainer(lora_run(model__adapter=str(tmp_path)), distributed)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "missing"),
        ({"A": torch.full((2, 32), torch.nan), "B": torch.zeros(32, 2)}, "not finite"),
        ({"A": torch.zeros(2, 32)}, "does not belong"),
        ({"A": torch.zeros(3, 32), "B": torch.zeros(32, 3)}, "does not belong"),
        ({"A": torch.zeros(2, 32), "B": torch.zeros(32, 2), "C": torch.zeros(2, 2)}, "does not belong"),
    ],
)
def test_tensors_that_are_no_adapter(pretrained, lora_run, tmp_path, tensors, message):
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 16.0, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    named = {f"{layer}.lora_{part}.weight": tensor for part, tensor in tensors.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.adapter=.*{message}"):
        build_model(lora_run(model__lora_rank=0, model__adapter=str(tmp_path)).model)


def test_an_adapter_of_another_model(lora_run, pretrained, tmp_path, tokenizer):
    run = train(lora_run(trainer__max_steps=1))
    other = new_model(small_shape(num_hidden_layers=1), tokenizer)
    other.save_pretrained(tmp_path / "other", tokenizer=tokenizer)
    config = lora_run(model__path=str(tmp_path / "other"), model__lora_rank=0, model__adapter=str(run / "hf_adapter"))
    with pytest.raises(ValueError, match=r"model\.adapter=.*: does not belong beside this model: model\.layers\.1"):
        build_model(config.model)
    wide = new_model(small_shape(hidden_size=64), tokenizer)
    wide.save_pretrained(tmp_path / "wide", tokenizer=tokenizer)
    config.model.path = str(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"model\.adapter=.*: does not belong"):
        build_model(config.model)


def test_an_adapter_is_trained_further_beside_the_same_layers(lora_run, pretrained):
    run = train(lora_run(model__target_modules=["q_proj"], trainer__max_steps=1))
    with init_distributed() as distributed, pytest.raises(ValueError, match=r"model\.target_modules"):
        FSDPSFTTrainer(lora_run("further", model__adapter=str(run / "hf_adapter")), distributed)


def test_a_run_with_defaults_keeps_the_recommendation_of_its_checkpoint(small_run, small_model, tokenizer, tmp_path):
    recommended = SamplingConfig(alg="maskgit_plus", temperature=0.7)
    small_model.save_pretrained(tmp_path / "source", tokenizer=tokenizer, sampling=recommended)
    settings = {"model__path": str(tmp_path / "source"), "trainer__max_steps": 1}
    kept = train(small_run("kept", **settings))
    assert json.loads((kept / "hf" / "generation_config.json").read_text())["temperature"] == 0.7
    config = small_run("changed", **settings)
    config.sampling.alg = "topk_margin"
    changed = json.loads((train(config) / "hf" / "generation_config.json").read_text())
    assert (changed["alg"], changed.get("temperature")) == ("topk_margin", None)


def test_muon_trains_adapters_and_resumes(lora_run):
    run = train(lora_run("muon", optim__name="muon"))
    before = losses(run)
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    assert losses(train(lora_run("muon", optim__name="muon"))) == before
