"""Autoregressive checkpoints of Transformers, adapted to diffusion."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffllm import ModelConfig, load_model
from diffllm.adapt import adapt, main, needs_adapting
from diffllm.loading import empty_model
from diffllm.tokenizer import builtin_tokenizer, load_tokenizer
from tests.conftest import GOLDEN
from tests.diffllm.decoders import DECODERS, WINDOW, write_decoder
from trainer.build import build_model
from trainer.parallel import read_weights


@pytest.fixture
def plain_tokenizer():
    """One that has `<|mask|>` among its special tokens, but does not name it."""
    tokenizer = builtin_tokenizer()
    tokenizer.mask_token = None
    return tokenizer


@pytest.fixture(params=DECODERS)
def decoder(request, tmp_path, plain_tokenizer):
    return write_decoder(request.param, tmp_path / "source", plain_tokenizer)


def buffers(model):
    return dict(model.named_buffers())


def assert_same_buffers(one, other):
    assert buffers(one).keys() == buffers(other).keys()
    assert buffers(one)
    for name, buffer in buffers(one).items():
        assert buffer.dtype == buffers(other)[name].dtype
        assert torch.equal(buffer, buffers(other)[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_road_gives_the_same_buffers(decoder, dtype, tmp_path):
    """Rotary frequencies and scales are in no file; they have gone wrong silently after loading."""
    adapted, tokenizer = adapt(str(decoder), dtype=dtype)
    fresh = AutoModelForCausalLM.from_config(adapted.lm.config, dtype=dtype)
    adapted.save_pretrained(tmp_path / "adapted", tokenizer=tokenizer)
    for model in (load_model(tmp_path / "adapted", dtype), empty_model(tmp_path / "adapted", dtype)):
        assert_same_buffers(adapted, model)
        assert_same_buffers(fresh, model.lm)


@pytest.mark.parametrize("model_type", DECODERS)
@torch.no_grad()
def test_a_token_sees_both_sides_in_every_layer(model_type, tmp_path, plain_tokenizer):
    """As far as the window of a layer, if it has one: Gemma's second has none."""
    model, _ = adapt(str(write_decoder(model_type, tmp_path / "source", plain_tokenizer)))
    length, place = 24, 12
    reach = {"mistral": (WINDOW, 2 * WINDOW), "gemma3_text": (WINDOW, length)}.get(model_type, (length, length))
    ids = torch.arange(length)[None]
    one, other = (
        model.lm.get_decoder()(input_ids=x, output_hidden_states=True).hidden_states
        for x in (ids, ids.masked_fill(ids == place, 99))
    )
    for layer, distance in enumerate(reach, start=1):
        changed = (one[layer][0] != other[layer][0]).any(-1)
        assert torch.equal(changed, (ids[0] - place).abs() <= distance)


def test_a_window_that_the_config_denies_is_none(tmp_path, plain_tokenizer):
    source = write_decoder("mistral", tmp_path, plain_tokenizer, sliding_window=None)
    assert json.loads((source / "config.json").read_text())["sliding_window"] is None
    model, _ = adapt(str(source))
    assert model.lm.config.sliding_window is None
    assert not model.windowed


def test_keys_and_values_are_not_kept_for_layers_with_a_window(tmp_path, plain_tokenizer):
    model, _ = adapt(str(write_decoder("gemma3_text", tmp_path / "source", plain_tokenizer)))
    with pytest.raises(ValueError, match=r"set sampling\.cache=none"):
        model.diffusion_generate(torch.arange(5)[None], max_new_tokens=4, steps=4, cache="dual", block_length=2)


@torch.no_grad()
def test_a_left_padded_batch_equals_single_rows(decoder):
    model, tokenizer = adapt(str(decoder))
    rows = [torch.arange(10, 22), torch.arange(30, 37)]
    ids = torch.full((2, 12), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
    together = model.denoise(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))
    for i, row in enumerate(rows):
        torch.testing.assert_close(together[i, -len(row) :], model.denoise(row[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text"])
def test_an_added_mask_is_the_mean_of_the_tokens_before_it(model_type, tied, tmp_path, plain_tokenizer):
    source = write_decoder(model_type, tmp_path / "source", plain_tokenizer, tie_word_embeddings=tied)
    before = load_file(source / "model.safetensors")
    model, tokenizer = adapt(str(source), "<|diffuse|>")
    known = len(plain_tokenizer)
    assert model.mask_token_id == tokenizer.mask_token_id == known
    assert tokenizer("a<|diffuse|>")["input_ids"][-1] == known
    assert model.vocab_size == len(tokenizer) == known + 1
    names = {"model.embed_tokens.weight"} if tied else {"model.embed_tokens.weight", "lm_head.weight"}
    for name in names:
        weight = model.lm.get_parameter(name)
        assert torch.equal(weight[:known], before[name])
        assert torch.equal(weight[known], weight[:known].mean(0))
    assert (model.lm.lm_head.weight is model.lm.get_input_embeddings().weight) is tied


def test_an_added_mask_takes_a_row_that_is_there(tmp_path, plain_tokenizer):
    known = len(plain_tokenizer)
    source = write_decoder("qwen2", tmp_path / "source", plain_tokenizer, vocab_size=known + 8)
    model, _ = adapt(str(source), "<|diffuse|>")
    weight = model.lm.model.embed_tokens.weight
    assert (model.mask_token_id, model.vocab_size, len(weight)) == (known, known + 8, known + 8)
    assert torch.equal(weight[known], weight[:known].mean(0))


def test_a_special_token_that_is_there_keeps_its_row(tmp_path, plain_tokenizer):
    source = write_decoder("qwen3", tmp_path / "source", plain_tokenizer)
    model, _ = adapt(str(source))
    assert model.mask_token_id == plain_tokenizer.convert_tokens_to_ids("<|mask|>")
    before = load_file(source / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.lm.state_dict().items())


def test_transformers_loads_what_is_saved(decoder, tmp_path, plain_tokenizer):
    """As the autoregressive model that it was, in the config's old and new words."""
    before = AutoModelForCausalLM.from_pretrained(decoder)
    model, tokenizer = adapt(str(decoder))
    model.save_pretrained(tmp_path / "adapted", tokenizer=tokenizer)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "adapted")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapted").mask_token == "<|mask|>"

    config = json.loads((tmp_path / "adapted" / "config.json").read_text())
    original = json.loads((decoder / "config.json").read_text())
    added = {"mask_token_id", "pad_token_id", "eos_token_id", "vocab_size", "rope_theta", "dtype"}
    added |= {"rope_scaling", "rope_local_base_freq"}
    assert {key: value for key, value in config.items() if key not in added} == {
        key: value for key, value in original.items() if key not in added
    }
    assert config["eos_token_id"] == config["pad_token_id"] == plain_tokenizer.eos_token_id
    assert config["rope_theta"] in (1e4, 5e5, 1e6)
    # By the old words alone, the frequencies are the same.
    del config["rope_parameters"]
    (tmp_path / "adapted" / "config.json").write_text(json.dumps(config))
    assert_same_buffers(load_model(tmp_path / "adapted"), model)


def test_an_adapted_checkpoint_is_like_any_other(decoder, tmp_path):
    assert needs_adapting(str(decoder))
    model, tokenizer = adapt(str(decoder), "<|diffuse|>")
    model.save_pretrained(tmp_path / "adapted", tokenizer=tokenizer)
    assert not needs_adapting(str(tmp_path / "adapted"))
    again = load_model(tmp_path / "adapted")
    assert again.family is model.family
    assert again.family.shift
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (again.mask_token_id, again.eos_token_id) == (model.mask_token_id, model.eos_token_id)
    assert load_tokenizer(tmp_path / "adapted").mask_token == "<|diffuse|>"


def test_the_trainer_and_the_sampler_adapt_by_themselves(tmp_path, plain_tokenizer):
    source = str(write_decoder("qwen2", tmp_path / "source", plain_tokenizer))
    model, tokenizer = build_model(ModelConfig(path=source, mask_token="<|diffuse|>"), empty=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert tokenizer.mask_token_id == model.mask_token_id
    output = model.eval().diffusion_generate(torch.arange(5)[None], max_new_tokens=4, steps=4)
    assert model.mask_token_id not in output


def test_the_command_writes_an_adapted_checkpoint(tmp_path, plain_tokenizer, capsys):
    source = str(write_decoder("qwen2", tmp_path / "source", plain_tokenizer))
    for more in ([source, f"{tmp_path}/out"], [source, f"{tmp_path}/other", "<|diffuse|>"]):
        main(more)
        assert f"model: {more[1]}, its mask is {[*more, '<|mask|>'][2]}, token " in capsys.readouterr().out
    assert load_model(tmp_path / "out").mask_token_id == plain_tokenizer.convert_tokens_to_ids("<|mask|>")
    assert load_model(tmp_path / "other").mask_token_id == len(plain_tokenizer)
    with pytest.raises(SystemExit) as end:
        main([f"{tmp_path}/nowhere", f"{tmp_path}/x"])
    assert end.value.code == f"error: model.path={tmp_path}/nowhere: no such directory, and no hub id either"
    with pytest.raises(SystemExit) as end:
        main([source, f"{tmp_path}/x", "--bogus"])
    assert (end.value.code, "usage" in capsys.readouterr().err) == (2, True)


def test_buffers_that_a_checkpoint_holds_come_back_by_shard(tmp_path, plain_tokenizer):
    model, tokenizer = adapt(str(write_decoder("glm4_moe", tmp_path / "source", plain_tokenizer)))
    name = "lm.model.layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).copy_(torch.arange(4.0))
    model.save_pretrained(tmp_path / "adapted", tokenizer=tokenizer)
    empty = empty_model(tmp_path / "adapted").to_empty(device="cpu")
    read_weights(empty, str(tmp_path / "adapted"))
    assert empty.get_buffer(name).tolist() == [0, 1, 2, 3]
    config = json.loads((tmp_path / "adapted" / "config.json").read_text())
    assert (config["partial_rotary_factor"], config["rope_theta"]) == (0.5, 1e4)  # where Transformers 4 looks for them


class TestWhatCannotBeAdapted:
    def config(self, tmp_path, **config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    @pytest.mark.parametrize(
        ("model_type", "reason"),
        [
            ("falcon", "has no `layers`"),
            ("gptj", "of Transformers has no sdpa attention"),
            ("opt", "has no `layers`|cannot attend in both"),
            ("gpt_oss", "of Transformers has no sdpa attention"),
        ],
    )
    def test_a_decoder_of_another_make(self, model_type, reason, tmp_path, plain_tokenizer):
        write_decoder(model_type, tmp_path, plain_tokenizer)
        with pytest.raises(ValueError, match=f"{tmp_path}: .*ForCausalLM {reason}"):
            adapt(str(tmp_path))

    def test_a_directory_that_is_there(self, tmp_path, plain_tokenizer):
        source = write_decoder("qwen2", tmp_path / "source", plain_tokenizer)
        before = sorted(file.stat().st_mtime_ns for file in source.iterdir())
        with pytest.raises(SystemExit, match="source exists: delete it, or name another directory"):
            main([str(source), str(source)])
        assert sorted(file.stat().st_mtime_ns for file in source.iterdir()) == before

    @pytest.mark.parametrize("model_type", ["t5", "bart", "gemma3", "bert", "nonsense", None])
    def test_other_models(self, model_type, tmp_path):
        with pytest.raises(ValueError, match="no causal decoder of Transformers, such as qwen2"):
            adapt(self.config(tmp_path, model_type=model_type))

    @pytest.mark.parametrize(
        ("model_type", "changes", "message"),
        [
            ("qwen2", {}, None),
            ("gemma3_text", {"final_logit_softcapping": 30.0}, "scales, caps or shifts its logits"),
            ("lfm2", {}, "has layers that are causal"),
        ],
        ids=["plain", "capped", "convolutions"],
    )
    def test_decoders_that_do_more_than_attend_and_project(
        self, model_type, changes, message, tmp_path, plain_tokenizer
    ):
        source = str(write_decoder(model_type, tmp_path / "source", plain_tokenizer, **changes))
        if message is None:
            adapt(source)
        else:
            with pytest.raises(ValueError, match=message):
                adapt(source)

    def test_mask_tokens_that_cannot_serve(self, tmp_path, plain_tokenizer):
        source = str(write_decoder("qwen2", tmp_path / "source", plain_tokenizer))
        with pytest.raises(ValueError, match=r"mask_token=Solve: a text may contain it; .*\(.*<\|mask\|>\)") as error:
            adapt(source, "Solve")
        assert "think" not in str(error.value)
        with pytest.raises(ValueError, match=r"mask_token=</think>: a text may contain it"):
            adapt(source, "</think>")
        with pytest.raises(ValueError, match=r"mask_token=model\.mask_token=<m>: a new token has no spaces and no ="):
            adapt(source, "model.mask_token=<m>")
        with pytest.raises(ValueError, match=r"mask_token=<\|im_start\|>: the chat template may contain it"):
            adapt(source, "<|im_start|>")
        with pytest.raises(ValueError, match="as mask and as padding or end"):
            adapt(source, "<|endoftext|>")

    def test_a_diffusion_model(self, tmp_path, plain_tokenizer):
        model, tokenizer = adapt(str(write_decoder("qwen2", tmp_path / "source", plain_tokenizer)))
        model.save_pretrained(tmp_path / "adapted", tokenizer=tokenizer)
        for source in (tmp_path / "adapted", GOLDEN / "dream_tiny"):
            with pytest.raises(ValueError, match=f"{source}: this is a diffusion model already"):
                adapt(str(source), "<|other|>")

    def test_load_model_says_how(self, tmp_path, plain_tokenizer):
        source = write_decoder("qwen2", tmp_path / "source", plain_tokenizer)
        with pytest.raises(ValueError, match=r"no mask_token_id.*python -m diffllm\.adapt SOURCE DIR"):
            load_model(source)
        assert not needs_adapting(str(GOLDEN / "dream_tiny"))
