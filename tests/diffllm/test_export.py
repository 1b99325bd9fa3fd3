"""Exports: shards, dtypes, code beside the weights, and keys that other tools read."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from diffllm import load_model, new_model
from diffllm.checkpoint_source import on_hub
from diffllm.tokenizer import load_tokenizer, save_tokenizer
from tests.conftest import GOLDEN, ROOT, no_longer_than, small_shape
from tests.diffllm.test_auto import CODE, published_copy
from tests.diffllm.test_tokenizer import write_dream_tokenizer


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def tensors_of(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(params=["dream", "llada"])
def source(request, tmp_path):
    """A checkpoint as on the hub: half precision, and code that its config.json names."""
    directory = published_copy(request.param, tmp_path / "source")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = config_of(directory)
    del config["dtype"]
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    for name in ("configuration", "modeling"):
        (directory / f"{name}_{request.param}.py").write_text(f"raise RuntimeError('{name} is not to run')")
    (directory / "generation_utils.py").write_text("# imported by the model")
    return directory


def test_a_checkpoint_comes_back_as_it_was(source, tmp_path):
    load_model(source, torch.bfloat16).save_pretrained(tmp_path / "out", max_shard_size="60KB")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys() == after.keys()
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert config_of(tmp_path / "out") == config_of(source) | {"dtype": "bfloat16"}
    assert {file.name for file in source.glob("*.py")} == {file.name for file in (tmp_path / "out").glob("*.py")}
    again = load_model(tmp_path / "out", torch.bfloat16)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again.logits(ids), AutoModel.from_pretrained(source, dtype=torch.bfloat16)(ids).logits)


def test_other_precision_is_said_everywhere(source, tmp_path):
    load_model(source).save_pretrained(tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_code_on_the_hub_is_named_by_its_repository():
    assert on_hub(CODE["dream"], "Dream-org/X") == {
        "AutoConfig": "Dream-org/X--configuration_dream.DreamConfig",
        "AutoModel": "Dream-org/X--modeling_dream.DreamModel",
    }
    named = {"AutoTokenizer": ["Dream-org/X--tokenization_dream.DreamTokenizer", None]}
    assert on_hub({"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}, "Dream-org/X") == named
    assert on_hub(named, "other/Y") == named


SCRIPT = """
import torch
from diffllm import load_model
from diffllm.loading import empty_model
from diffllm.tokenizer import load_tokenizer
from trainer.parallel import read_weights
name = "Dream-org/Tiny"
model, empty = load_model(name), empty_model(name).to_empty(device="cpu")
read_weights(empty, name)
assert all(torch.equal(weight, empty.get_parameter(key)) for key, weight in model.named_parameters())
model.save_pretrained("out", tokenizer=load_tokenizer(name))
"""


@pytest.mark.slow
def test_a_hub_id_is_like_a_directory(tmp_path):
    """From the hub's cache, laid out as a download leaves it."""
    snapshot = tmp_path / "cache" / "models--Dream-org--Tiny" / "snapshots" / "0123abc"
    write_dream_tokenizer(published_copy("dream", snapshot))
    (snapshot / "generation_config.json").unlink()  # which not every checkpoint has
    (tmp_path / "cache" / "models--Dream-org--Tiny" / "refs").mkdir()
    (tmp_path / "cache" / "models--Dream-org--Tiny" / "refs" / "main").write_text("0123abc")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = config_of(tmp_path / "out")
    assert config["auto_map"]["AutoModel"] == "Dream-org/Tiny--modeling_dream.DreamModel"
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["auto_map"] == {"AutoTokenizer": ["Dream-org/Tiny--tokenization_dream.DreamTokenizer", None]}


def test_a_silent_hub_is_not_waited_for(silent_hub):
    with no_longer_than(20), pytest.raises(ValueError, match="no directory") as error:
        load_model("nobody/nothing")
    for said in (constants.HF_HUB_CACHE, f"the hub does not answer ({silent_hub}: ", "`hf download nobody/nothing "):
        assert said in str(error.value)


def test_dreams_tokenizer_is_saved_for_its_own_class_and_for_transformers(tmp_path):
    source = write_dream_tokenizer(published_copy("dream", tmp_path / "source"))
    tokenizer = load_tokenizer(source)
    for name, expected in (("code", "DreamTokenizer"), ("plain", "Qwen2Tokenizer")):
        directory = tmp_path / name
        shutil.copytree(GOLDEN / "dream_tiny", directory)
        save_tokenizer(tokenizer, directory)
        config = json.loads((directory / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == expected
        again = load_tokenizer(directory)
        assert config["chat_template"] == again.chat_template == tokenizer.chat_template
        assert not {"backend", "is_local", "local_files_only"} & config.keys()
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again("é<|mask|>")["input_ids"] == tokenizer("é<|mask|>")["input_ids"]
        if name == "code":  # what the published class reads
            assert json.loads((directory / "vocab.json").read_text()) == json.loads((source / "vocab.json").read_text())
            assert config["added_tokens_decoder"]["257"]["content"] == "<|mask|>"
        tokenizer.init_kwargs.pop("auto_map", None)


def test_lladas_embeddings_may_have_more_rows_than_tokens(tmp_path, tokenizer):
    model = new_model(small_shape(family="llada", vocab_size=1300), tokenizer)
    model.save_pretrained(tmp_path / "scratch")
    config = config_of(tmp_path / "scratch")
    assert config["embedding_size"] == config["vocab_size"] == 1300
    (tmp_path / "scratch" / "config.json").write_text(json.dumps(config | {"vocab_size": 1256}))
    again = load_model(tmp_path / "scratch")
    assert torch.equal(again.lm.lm_head.weight, model.lm.lm_head.weight)
