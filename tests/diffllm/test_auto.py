"""Transformers' Auto classes load published checkpoints without remote code or a question."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from diffllm.auto import DreamTokenizer
from tests.conftest import GOLDEN
from tests.diffllm.test_golden import DREAM, LLADA, assert_same_logits
from tests.diffllm.test_tokenizer import write_dream_tokenizer

# As the published config.json have it.
CODE = {
    "dream": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "llada": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
}


def published_copy(family, directory):
    """A golden checkpoint whose config.json names code, as those on the hub do."""
    shutil.copytree(GOLDEN / f"{family}_tiny", directory)
    config = json.loads((directory / "config.json").read_text()) | {"auto_map": CODE[family]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(params=["dream", "llada"])
def family(request, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked whether code may run"))
    return request.param


def test_the_config_has_the_published_sizes(family, tmp_path):
    config = AutoConfig.from_pretrained(published_copy(family, tmp_path / "copy"))
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 3, 256)
    assert config.max_position_embeddings == 512
    assert config.rope_parameters["rope_theta"] == {"dream": 1e6, "llada": 5e5}[family]


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
@torch.no_grad()
def test_the_logits_are_the_published_ones(family, auto, tmp_path):
    golden = {"dream": DREAM, "llada": LLADA}[family]
    model = auto.from_pretrained(published_copy(family, tmp_path / "copy"))
    assert_same_logits(model(golden["full.input_ids"]).logits, golden["full.logits"])


def test_what_transformers_saves_has_the_published_names(family, tmp_path):
    AutoModel.from_pretrained(published_copy(family, tmp_path / "copy")).save_pretrained(tmp_path / "saved")
    before, after = (load_file(path / "model.safetensors") for path in (GOLDEN / f"{family}_tiny", tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert (again.config.hidden_size, again.config.is_causal) == (64, False)


def test_dreams_tokenizer(monkeypatch, tmp_path):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked whether code may run"))
    tokenizer = AutoTokenizer.from_pretrained(write_dream_tokenizer(published_copy("dream", tmp_path / "copy")))
    assert isinstance(tokenizer, DreamTokenizer)
    assert tokenizer.decode(tokenizer("Hi é")["input_ids"]) == "Hi é"
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (257, 256)
