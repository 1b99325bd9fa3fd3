"""Runs of block diffusion: the same in any layout, and an export that says its block length."""

import json
from contextlib import nullcontext

import pytest
import torch
from omegaconf import OmegaConf

from data import prompt_ids
from diffllm import load_model, new_model
from diffllm.diffusion.block import BlockConfig
from diffllm.diffusion.objective import settings_of
from diffllm.generate import generate
from sampling import SamplingConfig
from tests.conftest import small_shape
from tests.trainer.runs import losses, metrics, train
from trainer.build import build_model, build_trainable, load_for_sampling
from trainer.config import Config
from trainer.export import export
from trainer.schema import resolve

COMPLEMENTARY = {"complementary": True, "t_sampler": "stratified", "time_reweighting": "none", "loss_norm": "masked"}


@pytest.fixture
def pretrained(tmp_path, tokenizer):
    new_model(small_shape(), tokenizer, seed=3).save_pretrained(tmp_path / "pretrained", tokenizer=tokenizer)
    return tmp_path / "pretrained"


@pytest.fixture
def block_run(small_run):
    def config(name="run", settings=None, **changes):
        config = small_run(name, **changes)
        config.diffusion = BlockConfig(block_length=4, **settings or {})
        return config

    return config


@pytest.mark.parametrize("settings", [{}, COMPLEMENTARY])
@pytest.mark.parametrize(
    "changes",
    [
        {"data__train_batch_size": 8, "data__micro_batch_size_per_gpu": 2},
        {"model__enable_gradient_checkpointing": True},
        {"data__packing": True},
        {"model__attn_implementation": "sdpa"},
    ],
)
def test_the_layout_changes_nothing(block_run, settings, changes):
    one, other = (train(block_run(name, settings, **each)) for name, each in (("one", {}), ("other", changes)))
    assert losses(other) == pytest.approx(losses(one), rel=1e-4)
    assert metrics(other)[-1]["val/elbo"] == pytest.approx(metrics(one)[-1]["val/elbo"], rel=1e-4)


def test_it_resumes_and_learns(block_run):
    constant = {"optim__lr_schedule": "constant", "optim__warmup_steps_ratio": 0.0}
    whole = losses(train(block_run("whole", **constant)))
    train(block_run("parts", trainer__max_steps=5, **constant))
    assert losses(train(block_run("parts", **constant))) == whole
    assert whole[-1] < whole[0]


def test_a_step_whose_first_copies_mask_nothing_trains_on_the_second_ones(block_run):
    rows = metrics(train(block_run("run", COMPLEMENTARY | {"mask_ratio": [1e-6, 2e-6]}, trainer__max_steps=2)))
    assert [row["data/masked_share"] for row in rows] == [1, 1]
    assert rows[-1]["train/skipped_steps"] == 0
    assert rows[0]["train/grad_norm"] > 0


def test_blocks_that_grow_beyond_the_run_are_refused(block_run):
    settings = {"block_warmup": [1, 2], "block_warmup_steps": 2}
    with pytest.raises(ValueError, match=r"diffusion\.block_warmup_steps=2: .* over 4 steps, and the run has 3"):
        train(block_run("short", settings, trainer__max_steps=3))


def test_a_run_resumes_while_its_blocks_grow(block_run):
    settings = {"block_warmup": [1, 2], "block_warmup_steps": 3}
    constant = {"optim__lr_schedule": "constant", "optim__warmup_steps_ratio": 0.0, "data__packing": True}
    whole = losses(train(block_run("whole", settings, trainer__max_steps=8, **constant)))
    train(block_run("parts", settings, trainer__max_steps=7, trainer__save_checkpoint_steps=4, **constant))
    assert losses(train(block_run("parts", settings, trainer__max_steps=8, **constant))) == whole


def test_adapters_are_trained(block_run, pretrained):
    run = train(block_run(model__path=str(pretrained), model__lora_rank=2, trainer__max_steps=2))
    assert json.loads((run / "hf" / "config.json").read_text())["block_length"] == 4


def test_an_adapter_keeps_the_blocks_that_it_was_trained_for(block_run, small_run, pretrained):
    lora = {"model__path": str(pretrained), "model__lora_rank": 2, "trainer__max_steps": 1}
    by_blocks, by_masks = train(block_run("blocks", **lora)), train(small_run("masks", **lora))
    for run, base, length in ((by_blocks, pretrained, 4), (by_masks, by_blocks / "hf", None)):
        settings = {"path": str(base), "adapter": str(run / "hf_adapter")}
        assert load_for_sampling(resolve(OmegaConf.create({"model": settings})))[0].block_length == length


def test_the_export_of_a_checkpoint_says_its_block_length(block_run, tmp_path):
    run = train(block_run(trainer__max_steps=1))
    export(run / "checkpoints" / "step_00000001", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["block_length"] == 4


def test_blocks_that_sampling_cannot_divide_are_refused_at_the_start(block_run):
    config = block_run()
    with pytest.raises(ValueError, match=r"sampling\.block_length=32: must divide diffusion\.block_length=4"):
        Config(diffusion=config.diffusion, sampling=SamplingConfig(block_length=32))


@pytest.mark.slow
def test_ranks_change_nothing(block_run, train_on_two_ranks):
    one = train(block_run("one", COMPLEMENTARY))
    train_on_two_ranks([block_run("two", COMPLEMENTARY)])
    assert losses(one.with_name("two")) == pytest.approx(losses(one), rel=1e-4)


def test_the_export_says_its_block_length_and_is_sampled_by_blocks(block_run, pretrained, tmp_path):
    run = train(block_run())
    config = resolve(OmegaConf.create({"model": {"path": str(run / "hf"), "attention": "block"}}))
    model, tokenizer = load_for_sampling(config)
    assert model.block_length == 4
    prompts = [prompt_ids([{"role": "user", "content": "Solve 3x+5=20"}], tokenizer)] * 2
    cached, plain = (
        [each.text for each in generate(model, tokenizer, prompts, SamplingConfig(max_new_tokens=9, cache=cache))]
        for cache in ("auto", "none")
    )
    assert cached == plain
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    assert load_model(tmp_path).block_length == 4
    config.model.attention = "full"
    assert load_for_sampling(config)[0].block_length is None
    config.model.attention, config.model.path = "block", str(pretrained)
    with pytest.raises(ValueError, match=r"model\.attention=block: config\.json of .* has no block_length"):
        load_for_sampling(config)


@pytest.mark.parametrize(
    ("diffusion", "attention", "allowed"),
    [("elbo", "block", False), ("block", "full", False), ("block", "block", True), ("causal", "full", True)],
)
def test_a_run_attends_as_its_objective_does(small_run, diffusion, attention, allowed):
    config = small_run(model__attention=attention)
    config.diffusion = settings_of({"elbo": "masked"}.get(diffusion, diffusion))()
    with nullcontext() if allowed else pytest.raises(ValueError, match=f"model.attention={attention}"):
        build_trainable(config, torch.device("cpu"))


@pytest.mark.parametrize("trait", ["windowed", "flash"])
@pytest.mark.parametrize("objective", ["block", "causal"])
def test_attention_that_hides_no_position_is_refused_at_the_start(small_run, monkeypatch, objective, trait):
    config = small_run()
    config.diffusion = settings_of(objective)()
    built = build_model(config.model)
    setattr(built[0], trait, True)
    monkeypatch.setattr("trainer.build.build_model", lambda *_, **__: built)
    with pytest.raises(ValueError, match=f"diffusion.objective={objective}: .* choose diffusion=elbo"):
        build_trainable(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("heads", "attention", "device"), [(4, "sdpa", "cuda"), (4, "auto", "cpu"), (2, "auto", "cuda")]
)
def test_heads_that_flex_attention_does_not_take_on_a_gpu(small_run, monkeypatch, heads, attention, device):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    config = small_run(model__num_attention_heads=heads, model__attn_implementation=attention)
    config.diffusion = settings_of("block")()
    build_trainable(config, torch.device(device))
    config.model.num_attention_heads, config.model.attn_implementation = 4, "varlen"
    with pytest.raises(ValueError, match=r"at least 16 dimensions on a GPU, and these have 8; set .*=sdpa"):
        build_trainable(config, torch.device("cuda"))


def test_a_run_by_masks_forgets_the_blocks_of_its_checkpoint(block_run, small_run, capsys):
    source = train(block_run(trainer__max_steps=1)) / "hf"
    capsys.readouterr()
    run = train(small_run("masked", model__path=str(source), trainer__max_steps=1, trainer__logger=["console"]))
    assert "all positions see each other; config.json of the model has blocks of 4" in capsys.readouterr().out
    assert "block_length" not in json.loads((run / "hf" / "config.json").read_text())


@pytest.mark.parametrize("value", [0, "4", 2.5, True])
def test_a_wrong_block_length_in_a_checkpoint_is_named(pretrained, tmp_path, value):
    published = json.loads((pretrained / "config.json").read_text()) | {"block_length": value}
    (tmp_path / "config.json").write_text(json.dumps(published))
    with pytest.raises(ValueError, match=r"config\.json has block_length="):
        load_model(tmp_path)
