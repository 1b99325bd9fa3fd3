"""Published block models by their config.json: SDAR and Fast-dLLM v2, in small."""

import json

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from diffllm import load_model
from diffllm.adapt import needs_adapting

SHAPE = {
    "vocab_size": 151_680, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 151643,
    "eos_token_id": 151643, "tie_word_embeddings": True,
}  # fmt: skip
PUBLISHED = {
    "sdar": (Qwen3ForCausalLM, Qwen3Config, {"model_type": "sdar", "architectures": ["SDARForCausalLM"]}),
    "fast_dllm_v2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"]},
    ),
}


@pytest.fixture(params=[*PUBLISHED])
def published(request, tmp_path):
    """A checkpoint whose config.json has no mask and no block length, as some of the published ones."""
    decoder, config, named = PUBLISHED[request.param]
    lm = decoder(config(**SHAPE)).eval()
    lm.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | named
    (tmp_path / "config.json").write_text(json.dumps(content))
    return request.param, tmp_path, lm


def test_null_in_config_json_means_the_published_default(published):
    name, directory, _ = published
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(content | {"block_size": None, "bd_size": None, "mask_token_id": None})
    )
    assert load_model(directory).block_length == {"sdar": 4, "fast_dllm_v2": 32}[name]


def test_mask_shift_and_block_length_are_those_of_the_published_code(published):
    name, directory, lm = published
    model = load_model(directory)
    expected = {"sdar": (151669, False, 4), "fast_dllm_v2": (151665, True, 32)}[name]
    assert (model.mask_token_id, model.family.shift, model.block_length) == expected
    assert not needs_adapting(directory)
    x = torch.randint(0, 1000, (1, 40))
    block = torch.arange(40) // model.block_length
    mask = torch.where(block[:, None] >= block, 0.0, -torch.inf)[None, None]
    logits = lm(input_ids=x, attention_mask=mask).logits
    ours = model.denoise(x)
    torch.testing.assert_close(ours[:, 1:] if expected[1] else ours, logits[:, :-1] if expected[1] else logits)


def test_the_export_has_the_key_of_the_family(published, tmp_path):
    name, directory, _ = published
    model = load_model(directory)
    key, out = model.family.block_key, tmp_path / "out"
    for length, written in ((8, 8), (None, 64)):  # without blocks a row is one
        model.block_length = length
        model.save_pretrained(out)
        content = json.loads((out / "config.json").read_text())
        assert (content[key], content["model_type"]) == (written, PUBLISHED[name][2]["model_type"])
        assert load_model(out).block_length == length


@pytest.mark.parametrize("model_type", ["sdar_moe", "llada2_moe"])
def test_mixtures_of_experts_are_refused_by_name(published, model_type):
    _, directory, _ = published
    content = json.loads((directory / "config.json").read_text()) | {"model_type": model_type}
    (directory / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"model_type='{model_type}'"):
        load_model(directory)
