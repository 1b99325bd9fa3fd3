"""Weights read shard by shard, and the ways to split, recompute, offload and compile a model."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy

from diffllm import load_model, new_model
from diffllm.loading import empty_model
from tests.conftest import small_shape
from tests.trainer.runs import losses, train, weights
from trainer import parallel
from trainer.distributed import Distributed, init_distributed
from trainer.parallel import read_weights, shard
from trainer.validation import ValSamples


@pytest.fixture(params=["dream", "llada", "dream-tied"])
def pretrained(request, tmp_path, tokenizer):
    """A published checkpoint with random weights in several files."""
    family, _, tied = request.param.partition("-")
    model = new_model(small_shape(family=family, tie_word_embeddings=bool(tied)), tokenizer, seed=3)
    directory = tmp_path / "pretrained"
    model.save_pretrained(directory, tokenizer=tokenizer)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    save_torch_state_dict(tensors, directory, max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


def sharded_copy(small_run, path, **changes):
    """The model of a checkpoint as the trainer loads it, and the whole tensors in it."""
    config = small_run(model__path=str(path), **changes)
    with init_distributed() as distributed:
        model = empty_model(path)
        assert all(parameter.is_meta for parameter in model.parameters())
        shard(model, distributed, config)
        return model, {name: parameter.full_tensor() for name, parameter in model.named_parameters()}


def test_sharded_weights_and_rotary_frequencies_are_those_of_the_file(small_run, pretrained):
    """No file holds the frequencies: each way of loading computes them."""
    whole = load_model(pretrained)
    sharded, tensors = sharded_copy(small_run, pretrained)
    assert tensors.keys() == dict(whole.named_parameters()).keys()
    assert all(torch.equal(tensor, whole.get_parameter(name)) for name, tensor in tensors.items())
    head_dim = whole.lm.config.hidden_size // whole.lm.config.num_attention_heads
    expected = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    for model in (whole, sharded):
        torch.testing.assert_close(model.lm.get_decoder().rotary_emb.inv_freq, expected)


def test_training_from_a_checkpoint_is_the_same_on_two_ranks(small_run, pretrained, train_on_two_ranks):
    alone = train(small_run("alone", model__path=str(pretrained)))
    on_two = small_run("two", model__path=str(pretrained))
    train_on_two_ranks([on_two])
    assert losses(alone) == pytest.approx(losses(alone.parent / "two"), rel=1e-6)
    assert not torch.equal(weights(alone)[name := next(iter(weights(alone)))], load_file_of(pretrained, name))
    load_model(alone / "hf")


def load_file_of(directory, name):
    return next(tensors[name] for file in directory.glob("*.safetensors") if name in (tensors := load_file(file)))


class TestWeightsThatDoNotFit:
    @pytest.fixture
    def pretrained(self, tmp_path, tokenizer):
        new_model(small_shape(), tokenizer).save_pretrained(tmp_path / "pretrained", tokenizer=tokenizer)
        return tmp_path / "pretrained"

    def edit(self, pretrained, change):
        tensors = load_file(pretrained / "model.safetensors")
        change(tensors)
        save_file(tensors, pretrained / "model.safetensors", metadata={"format": "pt"})

    def test_missing_and_unexpected(self, small_run, pretrained):
        self.edit(pretrained, lambda tensors: tensors.update({"extra.weight": tensors.pop("model.norm.weight")}))
        with pytest.raises(ValueError, match=r"missing: model\.norm\.weight; unexpected: extra\.weight"):
            sharded_copy(small_run, pretrained)

    def test_another_shape(self, small_run, pretrained):
        self.edit(pretrained, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
        with pytest.raises(ValueError, match=r"model\.norm\.weight is \(3,\) in the file, \(32,\) by the config"):
            sharded_copy(small_run, pretrained)

    def test_cut_short(self, small_run, pretrained):
        file = pretrained / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match="the weights cannot be read"):
            sharded_copy(small_run, pretrained)

    def test_no_safetensors(self, small_run, pretrained):
        (pretrained / "model.safetensors").rename(pretrained / "model.bin")
        with pytest.raises(ValueError, match=r"no \.safetensors files"):
            sharded_copy(small_run, pretrained)

    def test_a_hub_that_cannot_be_reached(self, small_model):
        with pytest.raises(ValueError, match=r"model\.path=nobody/nothing: .*the hub.* the weights cannot be read"):
            read_weights(small_model, "nobody/nothing")


def test_bf16_files_are_trained_in_float32(small_run, tmp_path, tokenizer):
    model = new_model(small_shape(), tokenizer)
    model.bfloat16().save_pretrained(tmp_path / "pretrained", tokenizer=tokenizer)
    _, tensors = sharded_copy(small_run, tmp_path / "pretrained")
    assert all(
        tensor.dtype == torch.float32 and torch.equal(tensor, model.get_parameter(name).float())
        for name, tensor in tensors.items()
    )


def test_recomputing_and_offloading_change_not_a_bit(small_run, default_run):
    for name, changes in {
        "full": {"model__enable_gradient_checkpointing": True},
        "selective": {"model__enable_gradient_checkpointing": True, "model__recompute": "selective"},
        "offload": {"trainer__cpu_offload": True},
    }.items():
        other = train(small_run(name, **changes))
        assert losses(other) == losses(default_run)
        assert all(torch.equal(tensor, weights(other)[key]) for key, tensor in weights(default_run).items())


def test_selective_recomputation_keeps_products_and_attention(small_run, monkeypatch):
    kept, policy = [], parallel._kept_or_not

    def recorded(context, operator, *arguments, **settings):
        decided = policy(context, operator, *arguments, **settings)
        if decided == CheckpointPolicy.MUST_SAVE and not context.is_recompute:
            kept.append(operator.name())
        return decided

    monkeypatch.setattr(parallel, "_kept_or_not", recorded)
    train(small_run(model__enable_gradient_checkpointing=True, model__recompute="selective", trainer__max_steps=1))
    assert len(kept) == 2 * (7 + 1)  # 7 linear layers and the attention of each of 2 layers


def test_copies_and_shards_change_nothing(small_run, default_run, train_on_two_ranks):
    """HSDP as 2 copies × 1 shard and 1 copy × 2 shards."""
    on_two = [
        small_run("2x1", trainer__replicate=2),
        small_run("1x2", trainer__replicate=1),
        small_run("2x1-offload", trainer__replicate=2, trainer__cpu_offload=True),
    ]
    train_on_two_ranks(on_two)
    for config in on_two:
        assert losses(Path(config.trainer.output_dir)) == pytest.approx(losses(default_run), rel=1e-6)


def test_copies_that_do_not_divide_the_ranks():
    with pytest.raises(ValueError, match=r"trainer\.replicate=2: must divide the 3 ranks"):
        parallel.build_mesh(Distributed(0, 3, torch.device("cpu")), 2)


@pytest.mark.slow
def test_compiled_layers_change_nothing(small_run, monkeypatch):
    """Sampling, whose shapes change all the time, compiles nothing."""
    graphs, sample = [], ValSamples.__call__

    def counted(samples):
        graphs.append(counters["stats"]["unique_graphs"])
        answers = sample(samples)
        graphs.append(counters["stats"]["unique_graphs"])
        return answers

    monkeypatch.setattr(ValSamples, "__call__", counted)
    shape = {"trainer__max_steps": 4, "model__num_hidden_layers": 1}
    plain = train(small_run("plain", **shape))
    graphs.clear()
    sampled = {"trainer__val_samples": 1, "sampling__max_new_tokens": 5, "sampling__steps": 1}
    compiled = train(small_run("compiled", model__compile="true", **sampled, **shape))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-6)
    assert 0 < graphs[0] == graphs[1]
