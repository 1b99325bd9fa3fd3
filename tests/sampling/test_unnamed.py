"""Ids that no token has: rows that fill up a vocabulary at its end, as Dream's and LLaDA's, and gaps in it."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from data import prompt_ids
from diffllm import new_model
from diffllm.generate import generate, special_tokens
from diffllm.tokenizer import builtin_tokenizer
from launch.chat import Conversation
from sampling import Canvas, SamplingConfig, Template, fill, ids_without_token, infill_templates
from tests.conftest import small_shape
from trainer.build import build_model

ROWS = 2048
MESSAGES = [{"role": "user", "content": "Hi"}]
SETTINGS = {
    "greedy": {},
    "drawn": {"temperature": 5.0},
    "drawn from few": {"temperature": 5.0, "top_p": 0.9, "top_k": 50, "confidence": "scaled"},
    "adaptive": {"transfer": "threshold", "temperature": 5.0},
    "cached": {"cache": "dual", "block_length": 4},
    "guided": {"cfg_scale": 1.0},
}


class Gapped:
    """A tokenizer that lacks ids within its range too."""

    def __init__(self, tokenizer, gaps):
        self.tokenizer, self.gaps = tokenizer, gaps

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *arguments, **settings):
        return self.tokenizer(*arguments, **settings)

    def get_vocab(self):
        return {token: id for token, id in self.tokenizer.get_vocab().items() if id not in self.gaps}


@pytest.fixture(scope="module")
def gapped():
    """Without the letters of the second half of the alphabet."""
    return Gapped(builtin_tokenizer(), builtin_tokenizer().convert_tokens_to_ids(list("nopqrstuvwxyz")))


@pytest.fixture(scope="module")
def model(gapped):
    """That likes best what it is not to give."""
    model = new_model(small_shape(vocab_size=ROWS), gapped.tokenizer).eval()
    model.unnamed_ids = ()
    unnamed = [*gapped.gaps, *range(len(gapped.tokenizer), ROWS)]

    def liked(_, arguments, logits):
        logits[:, unnamed] += 10.0
        return logits

    model.lm.lm_head.register_forward_hook(liked)
    return model


@pytest.fixture
def config():
    return SamplingConfig(max_new_tokens=12, steps=6, stop_at_eos=False)


def assert_named(tokens, gapped):
    assert {*map(int, tokens)} <= {*gapped.get_vocab().values()}


def test_ids_without_a_token(gapped):
    assert ids_without_token(gapped.tokenizer, len(gapped.tokenizer)) == ()
    assert ids_without_token(gapped, ROWS) == (*sorted(gapped.gaps), *range(len(gapped.tokenizer), ROWS))


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_they_are_never_sampled(model, gapped, config, changes):
    config = replace(config, **changes)
    canvas = Canvas.after(prompt_ids(MESSAGES, gapped), 12, model.mask_token_id)
    [free] = fill(model, [canvas], config, model.special_tokens)
    with pytest.raises(AssertionError):
        assert_named(free.tokens, gapped)
    [row] = fill(model, [canvas], config, special_tokens(model, gapped, config))
    assert_named(row.tokens, gapped)
    [response] = generate(model, gapped, [canvas.tokens[: canvas.prompt_length]], config)
    assert response.text == gapped.decode(row.response)


def test_nor_in_slots_and_chats(model, gapped, config):
    template = Template.parse("a<|mask:5|>b<|mask:1-4|>")
    [infilled] = infill_templates(model, gapped, [template], config, model.special_tokens)
    assert_named(infilled.tokens, gapped)
    chat = Conversation(model, gapped, config, Console(file=io.StringIO()), None)
    prompt = prompt_ids(MESSAGES, gapped)
    chat.turn(MESSAGES[-1], prompt)
    [response] = generate(model, gapped, [prompt], config)
    assert chat.turns[-1]["content"] == response.text


@pytest.mark.parametrize("hook", [None, lambda step, x, logits: logits], ids=["", "hooked"])
def test_nor_by_a_model_that_is_told_its_tokenizer(model, gapped, hook):
    prompt = torch.tensor([prompt_ids(MESSAGES, gapped)])
    settings = {"max_new_tokens": 8, "steps": 4, "alg": "entropy", "generation_logits_hook_func": hook}
    with pytest.raises(AssertionError):
        assert_named(model.diffusion_generate(prompt, **settings)[0], gapped)
    assert_named(model.diffusion_generate(prompt, tokenizer=gapped, **settings)[0], gapped)


def test_a_model_learns_of_them_where_it_is_made(tokenizer, tmp_path):
    unnamed = (*range(len(tokenizer), ROWS),)
    made = new_model(small_shape(vocab_size=ROWS), tokenizer)
    assert made.unnamed_ids == unnamed
    made.save_pretrained(tmp_path, tokenizer=tokenizer)
    model, _ = build_model(small_shape(path=str(tmp_path)))
    assert model.special_tokens.forbidden == unnamed
