"""`diffusion_generate` takes what the published code takes, and the models of the Auto classes have it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from diffllm import load_model
from tests.conftest import GOLDEN

PROMPT = torch.tensor([[70, 71, 72]])
SETTINGS = {"max_new_tokens": 8, "steps": 8, "alg": "entropy", "seed": 3}


def generated(model, **settings):
    return model.diffusion_generate(PROMPT, **SETTINGS | settings).tolist()


def test_the_prompts_under_their_published_name(small_model):
    assert torch.equal(small_model.diffusion_generate(inputs=PROMPT, **SETTINGS), torch.tensor(generated(small_model)))
    for given in ({}, {"input_ids": PROMPT, "inputs": PROMPT}):
        with pytest.raises(ValueError, match="input_ids, or inputs"):
            small_model.diffusion_generate(**given, **SETTINGS)


@pytest.mark.parametrize("kind", [dict, GenerationConfig, SimpleNamespace])
def test_settings_of_a_configuration(kind, small_model):
    config = kind(**SETTINGS | {"temperature": 0.7, "top_p": 0.9})
    expected = generated(small_model, temperature=0.7, top_p=0.9)
    assert small_model.diffusion_generate(PROMPT, generation_config=config).tolist() == expected
    explicit = small_model.diffusion_generate(PROMPT, generation_config=config, temperature=0.0, top_p=None)
    assert explicit.tolist() == generated(small_model)
    longer = small_model.diffusion_generate(PROMPT, generation_config=config, max_length=7)
    assert longer.shape == (1, 7)


def test_a_published_configuration_has_a_max_length_of_its_own(small_model):
    config = SimpleNamespace(**SETTINGS, max_length=20, transformers_version="4.46", generation_kwargs={})
    assert small_model.diffusion_generate(PROMPT, generation_config=config).tolist() == generated(small_model)
    output = small_model.diffusion_generate(
        PROMPT, generation_config=GenerationConfig(max_length=9, steps=2, return_dict_in_generate=True)
    )
    assert output.sequences.shape == (1, 9)


@pytest.mark.parametrize("config", [3, "steps=4", object()])
def test_what_is_no_configuration(config, small_model):
    with pytest.raises(ValueError, match="generation_config="):
        small_model.diffusion_generate(PROMPT, generation_config=config)


def test_a_configuration_in_the_place_of_the_attention_mask(small_model):
    with pytest.raises(ValueError, match="name generation_config="):
        small_model.diffusion_generate(PROMPT, GenerationConfig())


def test_max_length_counts_the_prompt(small_model):
    settings = {name: value for name, value in SETTINGS.items() if name != "max_new_tokens"}
    assert small_model.diffusion_generate(PROMPT, max_length=11, **settings).tolist() == generated(small_model)
    assert generated(small_model, max_length=11) == generated(small_model)
    with pytest.raises(ValueError, match=r"max_length=12 and max_new_tokens=8 .* 3 tokens"):
        generated(small_model, max_length=12)
    with pytest.raises(ValueError, match="max_length=12 and max_new_tokens=8"):
        small_model.diffusion_generate(PROMPT, generation_config=SETTINGS | {"max_length": 12})
    for length in (3, 1):
        with pytest.raises(ValueError, match=f"max_length={length}"):
            small_model.diffusion_generate(PROMPT, max_length=length)


def test_several_sequences_of_each_prompt(small_model):
    prompts = torch.tensor([[70, 71, 72], [5, 80, 81]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    several = {"num_return_sequences": 3, "temperature": 1.0}
    sequences = small_model.diffusion_generate(prompts, attention_mask=mask, **SETTINGS, **several)
    assert sequences[:, :3].tolist() == prompts.repeat_interleave(3, 0).tolist()
    assert len(set(map(tuple, sequences[:3].tolist()))) > 1
    with pytest.raises(ValueError, match="num_return_sequences=0"):
        generated(small_model, num_return_sequences=0)


def test_tokens_in_place_of_the_models(small_model):
    prompt = torch.tensor([[70, 9, 72]])
    filled = small_model.diffusion_generate(prompt, mask_token_id=9, **SETTINGS)
    assert filled.tolist() == generated_like(small_model, prompt, 9)
    whole = generated(small_model)[0]
    ended = generated(small_model, eos_token_id=[whole[5], 1], stop_at_eos=True)[0]
    assert ended == whole[: whole.index(whole[5], 3) + 1] + [whole[5]] * (10 - whole.index(whole[5], 3))
    assert generated(small_model, bos_token_id=1, pad_token_id=2) == generated(small_model)
    for name in ("mask_token_id", "eos_token_id"):
        for token in (-1, 10**6, "x", 1.5):
            with pytest.raises(ValueError, match=f"{name}={token!r}"):
                generated(small_model, **{name: token})
    with pytest.raises(ValueError, match=r"mask_token_id=7.*eos_token_id"):
        generated(small_model, mask_token_id=7, eos_token_id=7)


@pytest.mark.parametrize("confidence", ["keep", "suppress"])
def test_an_end_is_committed_first_or_last(confidence, dream):
    history = {"transfer": "even", "return_dict_in_generate": True, "output_history": True}
    first = dream.diffusion_generate(PROMPT, **SETTINGS, **history).history[0]
    [end] = first[first != dream.mask_token_id][3:].tolist()
    again = dream.diffusion_generate(PROMPT, **SETTINGS, **history, eos_token_id=end, eos_confidence=confidence)
    assert torch.equal(again.history[0], first) == (confidence == "keep")


def generated_like(model, prompt, mask):
    """Output of a model whose own mask is another token."""
    before, model.mask_token_id = model.mask_token_id, mask
    try:
        return model.diffusion_generate(prompt, **SETTINGS).tolist()
    finally:
        model.mask_token_id = before


def test_padding_without_an_attention_mask(small_model):
    with pytest.warns(UserWarning, match="attention_mask"):
        generated(small_model, pad_token_id=70)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("step", "steps"),
        ("temprature", "temperature"),
        ("max_tokens", "max_new_tokens"),
        ("algs", "alg"),
        ("blok_length", "block_length"),
        ("output_histories", "output_history"),
        ("attention_masks", "attention_mask"),
        ("generation_logits_hook", "generation_logits_hook_func"),
    ],
)
def test_an_argument_that_there_is_not(name, close, small_model):
    for given in ({name: 1}, {"generation_config": {name: 1}}):
        with pytest.raises(ValueError, match=rf"no setting {name}; did you mean {close}\b"):
            small_model.diffusion_generate(PROMPT, **given)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("family", ["dream", "llada"])
class TestAuto:
    def test_it_generates_as_load_model_does(self, family, auto):
        ours, theirs = load_model(GOLDEN / f"{family}_tiny").eval(), auto.from_pretrained(GOLDEN / f"{family}_tiny")
        masks = torch.tensor([[0, 1, 1], [1, 1, 1]])
        prompts = PROMPT.repeat(2, 1)
        for settings in ({}, {"temperature": 0.8}, {"alg": "origin", "output_history": True}):
            settings = SETTINGS | settings | {"attention_mask": masks, "return_dict_in_generate": True}
            expected, found = (model.diffusion_generate(prompts, **settings) for model in (ours, theirs))
            assert torch.equal(expected.sequences, found.sequences)
            assert expected.nfe == found.nfe
            assert len(expected.history or []) == len(found.history or [])

    def test_generating_leaves_it_as_it_was(self, family, auto):
        model = auto.from_pretrained(GOLDEN / f"{family}_tiny")
        names, padding = list(model.state_dict()), model.get_input_embeddings().padding_idx
        model.diffusion_generate(PROMPT, **SETTINGS)
        assert list(model.state_dict()) == names
        assert model.get_input_embeddings().padding_idx == padding

    def test_left_to_right_is_refused(self, family, auto):
        with pytest.raises(ValueError, match="diffusion_generate"):
            auto.from_pretrained(GOLDEN / f"{family}_tiny").generate(PROMPT, max_new_tokens=3)

    def test_a_config_without_a_mask(self, family, auto, tmp_path):
        shutil.copytree(GOLDEN / f"{family}_tiny", tmp_path / "copy")
        config = json.loads((tmp_path / "copy" / "config.json").read_text())
        (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"mask_token_id": None}))
        with pytest.raises(ValueError, match="no mask_token_id"):
            auto.from_pretrained(tmp_path / "copy").diffusion_generate(PROMPT)


def test_left_to_right_is_refused(small_model):
    with pytest.raises(ValueError, match="diffusion_generate"):
        small_model.generate(PROMPT)


SHAPE, KIND = "attention_mask has shape", r"input_ids: must be a tensor of token ids \[B, P\]"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_mask": torch.ones(2, 4)}, rf"{SHAPE} \[2, 4\]: must be that of input_ids, \[2, 3\]"),
        ({"attention_mask": torch.ones(2, 2)}, SHAPE),
        ({"attention_mask": torch.ones(1, 3)}, SHAPE),
        ({"input_ids": torch.tensor([5, 6])}, KIND),
        ({"input_ids": torch.ones(2, 3)}, KIND),
        ({"input_ids": [[1, 2]]}, f"{KIND}, not list"),
        ({"input_ids": torch.ones(0, 3, dtype=torch.long)}, KIND),
        ({"input_ids": torch.tensor([[10**6]])}, "input_ids: 1000000 is no token below"),
        ({"max_length": "9"}, "max_length='9': must be a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: must be a whole number"),
        ({"num_return_sequences": "2"}, "num_return_sequences='2': must be a whole number"),
        ({"temperature": "hot"}, "temperature='hot': must be a number"),
        ({"top_p": "x"}, "top_p='x': must be a number"),
        ({"bos_token_id": "x"}, "bos_token_id='x': must be a whole number"),
    ],
)
def test_arguments_of_another_kind(dream, settings, message):
    arguments = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "max_new_tokens": 2, "steps": 2} | settings
    with pytest.raises(ValueError, match=message):
        dream.diffusion_generate(**arguments)


def test_numbers_of_numpy_are_numbers(dream):
    x = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": np.int64(2), "steps": 2, "temperature": 0.5, "seed": 1}
    one, other = (dream.diffusion_generate(x, top_p=top_p, **settings) for top_p in (1, np.float32(1)))
    assert torch.equal(one, other)
