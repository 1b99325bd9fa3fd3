"""Adapters begin as nothing, train alone, and merge into the weights they stand beside."""

import sys

import pytest
import torch

from diffllm import load_model, new_model
from diffllm.loading import empty_model
from diffllm.lora import add_lora, merge_lora
from tests.conftest import small_shape

IDS = torch.arange(24).reshape(2, 12)


def adapted(tokenizer, **changes):
    config = small_shape(lora_rank=4, **changes)
    model = new_model(config, tokenizer)
    before = model.logits(IDS)
    add_lora(model, config, seed=1)
    return config, model, before


@pytest.mark.parametrize("family", ["dream", "llada"])
@torch.no_grad()
def test_adapters_begin_as_nothing_and_merge(tokenizer, tmp_path, family):
    config, model, before = adapted(tokenizer, family=family)
    torch.testing.assert_close(model.logits(IDS), before)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    after = model.logits(IDS)
    assert (after - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path, merge_lora(model.state_dict(), config), tokenizer)
    torch.testing.assert_close(load_model(tmp_path).logits(IDS), after, rtol=1e-4, atol=1e-4)


def test_only_adapters_are_trained(tokenizer):
    _, model, _ = adapted(tokenizer)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert all(".lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)


def test_chosen_layers_only(tokenizer):
    _, model, _ = adapted(tokenizer, target_modules=["q_proj", "v_proj"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in trained)


def test_adapters_of_an_empty_model_are_those_of_a_full_one(tokenizer, tmp_path):
    config = small_shape(lora_rank=4)
    full = new_model(config, tokenizer)
    full.save_pretrained(tmp_path, tokenizer=tokenizer)
    empty = empty_model(tmp_path, torch.bfloat16)
    for model in (full, empty):
        add_lora(model, config, seed=1)
    for name, parameter in empty.named_parameters():
        if ".lora_" in name:
            assert torch.equal(parameter, full.get_parameter(name))
            assert parameter.dtype == torch.float32
        else:
            assert parameter.is_meta


def test_a_target_that_matches_nothing(tokenizer):
    with pytest.raises(ValueError, match=r"target_modules=\[q_proj,w_proj\]: no linear layer is called w_proj; choose"):
        adapted(tokenizer, target_modules=["q_proj", "w_proj"])


def test_without_peft(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs peft: pip install 'diffllm\[lora\]'"):
        adapted(tokenizer)
