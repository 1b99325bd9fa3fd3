"""Checkpoints in and out."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffllm import load_model, new_model
from diffllm.adapt import needs_adapting
from diffllm.loading import empty_model
from diffllm.tokenizer import load_tokenizer, save_tokenizer
from tests.conftest import GOLDEN, small_shape
from tests.sampling.models import unpadded
from trainer.parallel import read_weights


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_a_published_checkpoint_survives_the_round_trip(family, tmp_path):
    source = GOLDEN / f"{family}_tiny"
    load_model(source).save_pretrained(tmp_path)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())
    generation = json.loads((source / "generation_config.json").read_text())
    tokens = {"eos_token_id": 254, "pad_token_id": 254, "use_cache": False}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == tokens | generation


def test_the_settings_of_generation_stay(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "dream_tiny", source)
    for ends, kept in (([254, 7], [254, 7]), ([7, 8], [254, 7, 8]), (7, [254, 7]), (254, 254)):
        settings = {"eos_token_id": ends, "temperature": 0.6, "do_sample": True, "use_cache": True}
        (source / "generation_config.json").write_text(json.dumps(settings))
        load_model(source).save_pretrained(tmp_path / "out")
        written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        tokens = {"bos_token_id": 254, "eos_token_id": kept, "pad_token_id": 254}
        assert written == settings | tokens | {"use_cache": False}
    (source / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json is not a JSON object"):
        empty_model(source)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("family", ["dream", "llada"])
def test_a_head_beside_a_tied_embedding(family, equal, tmp_path):
    """Both ways in take it only if it is the embedding."""
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / f"{family}_tiny", source)
    names = load_model(source).family.published_name
    key = "weight_tying" if family == "llada" else "tie_word_embeddings"
    config = json.loads((source / "config.json").read_text()) | {key: True}
    (source / "config.json").write_text(json.dumps(config))
    if equal:
        weights = load_file(source / "model.safetensors")
        weights[names("lm_head.weight")] = weights[names("model.embed_tokens.weight")].clone()
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})

    def by_shard():
        empty = empty_model(source).to_empty(device="cpu")
        empty.lm.tie_weights()
        read_weights(empty, str(source))
        return empty

    if equal:
        assert torch.equal(load_model(source).lm.lm_head.weight, by_shard().lm.lm_head.weight)
    else:
        for load in (lambda: load_model(source), by_shard):
            with pytest.raises(ValueError, match=r"tie_word_embeddings=true, but the head .*; set it to false"):
                load()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["dream", "llada"])
def test_a_model_from_scratch_survives_the_round_trip(family, tied, tmp_path, tokenizer):
    model = new_model(small_shape(family=family, tie_word_embeddings=tied), tokenizer, seed=3)
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    again = load_model(tmp_path)
    assert again.family is model.family
    assert again.mask_token_id == tokenizer.mask_token_id
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    # Rotary frequencies are no part of a checkpoint; they have gone wrong silently after loading.
    assert torch.equal(model.lm.model.rotary_emb.inv_freq, again.lm.model.rotary_emb.inv_freq)
    text = "Solve 3x+5=20 <think>é\n"
    ids = tokenizer(text)["input_ids"]
    assert load_tokenizer(tmp_path)(text)["input_ids"] == ids


@pytest.mark.parametrize(("family", "theta"), [("dream", 1e6), ("llada", 5e5)])
def test_rotary_frequencies_come_from_the_config(family, theta, request):
    model = request.getfixturevalue(family)
    expected = theta ** -(torch.arange(0, 16, 2).float() / 16)
    torch.testing.assert_close(model.lm.model.rotary_emb.inv_freq, expected)
    half = load_model(GOLDEN / f"{family}_tiny", dtype=torch.bfloat16)
    assert half.lm.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(half.lm.model.rotary_emb.inv_freq, model.lm.model.rotary_emb.inv_freq)


def test_the_seed_decides_the_weights(tokenizer):
    one, same, other = (new_model(small_shape(), tokenizer, seed).lm.lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_token_sees_both_sides(small_model):
    ids = torch.arange(12)[None]
    changed = ids.clone()
    changed[0, -1] = 99
    with torch.no_grad():
        assert not torch.equal(small_model.logits(ids)[0, 0], small_model.logits(changed)[0, 0])


@pytest.mark.parametrize(("family", "shift"), [("dream", True), ("llada", False)])
@torch.no_grad()
def test_denoise_gives_shifted_logits_where_asked(family, shift, request):
    model = request.getfixturevalue(family)
    x = torch.arange(10)[None]
    raw = model.logits(x)
    expected = torch.cat([raw[:, :1], raw[:, :-1]], dim=1) if shift else raw
    where = torch.zeros_like(x, dtype=torch.bool)
    where[0, [0, 3, 9]] = True
    torch.testing.assert_close(model.denoise(x), expected)
    hidden = model.hidden(x, *unpadded(x), *where.nonzero(as_tuple=True))
    torch.testing.assert_close(model.head(hidden), expected[where])


class TestBadCheckpoints:
    @pytest.fixture
    def copy(self, tmp_path):
        shutil.copytree(GOLDEN / "dream_tiny", tmp_path / "copy")
        return tmp_path / "copy"

    def edit(self, copy, **changes):
        config = json.loads((copy / "config.json").read_text()) | changes
        (copy / "config.json").write_text(json.dumps(config))

    def test_no_such_directory(self, tmp_path):
        with pytest.raises(ValueError, match=r"nowhere: no such directory"):
            load_model(tmp_path / "nowhere")

    def test_what_is_no_model(self, copy, tmp_path):
        with pytest.raises(ValueError, match=rf"{tmp_path}: it has no config\.json; did you mean {copy}\?"):
            load_model(tmp_path)
        with pytest.raises(ValueError, match=r"config\.json: a model is a directory, a hub id or a \.gguf file"):
            load_model(copy / "config.json")
        (copy / "config.json").unlink()
        with pytest.raises(ValueError, match=rf"{copy}: it has no config\.json; give one that holds a model"):
            load_model(copy)

    def test_unknown_family(self, copy):
        self.edit(copy, model_type="bert")
        with pytest.raises(ValueError, match=r"model_type='bert'.*Dream, llada"):
            load_model(copy)

    def test_another_model_of_the_same_type(self, copy):
        self.edit(copy, architectures=["DreamForCausalLM"])
        with pytest.raises(ValueError, match=r"architectures=\['DreamForCausalLM'\]: only DreamModel is supported"):
            load_model(copy)

    def test_no_mask_token(self, copy):
        self.edit(copy, mask_token_id=None)
        with pytest.raises(ValueError, match="no mask_token_id"):
            load_model(copy)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"mask_token_id": 254}, "token 254 as mask and as padding or end"),
            ({"mask_token_id": 256}, "mask_token_id=256, which is no token below vocab_size=256"),
            ({"eos_token_id": [254, 3]}, r"eos_token_id=\[254, 3\], which is no token"),
            ({"eos_token_id": None}, "no eos_token_id"),
        ],
        ids=str,
    )
    def test_special_tokens_that_cannot_serve(self, copy, changes, message):
        self.edit(copy, **changes)
        with pytest.raises(ValueError, match=message):
            load_model(copy)

    def test_padding_is_the_end_of_sequence_where_none_is_given(self, copy):
        self.edit(copy, pad_token_id=None)
        assert load_model(copy).pad_token_id == 254

    @pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
    def test_attention_that_is_not_installed(self, copy):
        with pytest.raises(ValueError, match=r"flash_attention_2 is not installed: pip install 'diffllm\[flash\]'"):
            load_model(copy, attn_implementation="flash_attention_2")

    def test_weights_of_another_shape(self, copy):
        self.edit(copy, vocab_size=300)
        with pytest.raises(ValueError, match=r"another shape: lm_head.weight is \(256, 64\) in the file, \(300, 64\)"):
            load_model(copy)

    def test_missing_and_unexpected_weights_are_all_named(self, copy):
        tensors = load_file(copy / "model.safetensors")
        tensors["extra.weight"] = tensors.pop("model.norm.weight")
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"missing: model\.norm\.weight; unexpected: extra\.weight"):
            load_model(copy)

    def test_a_file_cut_short(self, copy):
        data = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(data[:1000])
        with pytest.raises(ValueError, match="weights cannot be read"):
            load_model(copy)

    def test_an_unsupported_variant(self, tmp_path):
        shutil.copytree(GOLDEN / "llada_tiny", tmp_path / "copy")
        self.edit(tmp_path / "copy", alibi=True)
        with pytest.raises(ValueError, match="alibi=True"):
            load_model(tmp_path / "copy")

    def test_no_tokenizer(self, copy):
        with pytest.raises(ValueError, match="no tokenizer files"):
            load_tokenizer(copy)


def test_the_home_of_the_user(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(GOLDEN / "dream_tiny", tmp_path / "copy")
    save_tokenizer(tokenizer, tmp_path / "copy")
    assert load_model("~/copy").source.name == empty_model("~/copy").source.name == str(tmp_path / "copy")
    assert load_tokenizer("~/copy").name_or_path == str(tmp_path / "copy")
    assert not needs_adapting("~/copy")
    load_model("~/copy").save_pretrained("~/saved")
    assert (tmp_path / "saved" / "config.json").exists()
    with pytest.raises(ValueError, match=f"model.path={tmp_path}/nothing: no such directory"):
        load_model("~/nothing")


def test_a_vocabulary_smaller_than_the_tokenizer(tokenizer):
    with pytest.raises(ValueError, match=r"model\.vocab_size=100.*1256"):
        new_model(small_shape(vocab_size=100), tokenizer)
