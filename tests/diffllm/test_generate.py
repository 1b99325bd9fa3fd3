"""Responses as text: where they stop, and what is kept of them."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffllm.generate import generate
from diffllm.tokenizer import builtin_tokenizer
from sampling import SamplingConfig

PROMPT = "Hi\n"


class Scripted:
    """Predicts one response to every prompt."""

    device, mask_token_id, pad_token_id = torch.device("cpu"), None, None
    lm = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))

    def check_sampling(self, config):
        pass

    def __init__(self, tokenizer, tokens, prompt_length):
        self.tokens, self.prompt_length = tokens, prompt_length
        self.mask_token_id, self.ends, self.vocab_size = (
            tokenizer.mask_token_id,
            [tokenizer.eos_token_id],
            len(tokenizer),
        )

    def hidden(self, x_t, position_ids, visibility, row, column, cache=None):
        wanted = torch.tensor(self.tokens)[column - self.prompt_length]
        return torch.nn.functional.one_hot(wanted, self.vocab_size) * 20.0

    def head(self, hidden):
        return hidden.clone()


def respond(tokenizer, pieces, **settings):
    """The response that is written in the tokens `pieces`, one a step."""
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    tokens = [id for piece in pieces for id in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    config = SamplingConfig(
        max_new_tokens=len(tokens), steps=len(tokens), alg="left_to_right", transfer="even", **settings
    )
    [response] = generate(Scripted(tokenizer, tokens, len(prompt)), tokenizer, [prompt], config)
    return response


@pytest.fixture(scope="module")
def merging():
    """A tokenizer with tokens that hold a stop string and more, or parts of one."""
    tokenizer = builtin_tokenizer()
    tokenizer.add_tokens([";\n\n", "\n\n\n", "END.", "xEN", "Dx", "</an", "swer>!"])
    return tokenizer


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "steps"),
    [
        (["a", ";\n\n", "b", "c"], "\n\n", "a;", 2),
        (["a", "\n\n\n", "b", "c"], "\n\n", "a", 2),
        (["a", "\n", "\n", "b", "c"], "\n\n", "a", 3),
        (["a", "\n", "\n\n\n", "b"], "\n\n", "a", 3),
        (["a", "b", "END.", "c"], "END", "ab", 3),
        (["a", "xEN", "Dx", "c"], "END", "ax", 3),
        (["a", "</an", "swer>!", "c"], "</answer>", "a", 3),
        (["\n", "a", "b"], "\n\n", "\nab", 3),  # the prompt ends with the other half
        (["a", "é", "b", "c"], "é", "a", 3),  # of two bytes
        (["😀" * 5, "b"], "😀" * 4, "", 16),
        (["<think>", "a", "</think>", "b"], "</think>", "<think>a", 3),
        (["a", "b", "c"], "d", "abc", 3),
    ],
    ids=str,
)
def test_a_stop_string_ends_a_response_in_whatever_tokens_it_is_written(merging, pieces, stop, text, steps):
    response = respond(merging, pieces, stop=[stop])
    assert response.text == text
    assert response.nfe == response.tokens == steps


def test_a_mask_that_was_drawn_is_not_in_the_text(tokenizer):
    response = respond(tokenizer, ["a", tokenizer.mask_token, "b"])
    assert (response.text, response.tokens, response.ended) == ("ab", 3, False)


@pytest.fixture(scope="module")
def blanks():
    """A tokenizer that writes a blank before each text, and drops it again, as those of Llama 2 do."""
    vocab = {token: id for id, token in enumerate([*"▁abcdefHi\n", "▁a", "▁b", "▁▁", "<s>", "<mask>"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[("▁", "a"), ("▁", "b"), ("▁", "▁")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>", mask_token="<mask>", pad_token="<s>")


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "steps"),
    [
        (["ab", "b", "c"], "b b", "a", 3),
        (["c", "a", "bc"], " a", "c", 3),
        (["ab", "\n", "c"], "\n", "ab ", 4),
        (["ab", "cd"], " ab", "ab cd", 5),
    ],
    ids=str,
)
def test_stop_strings_with_blanks_in_them(blanks, pieces, stop, text, steps):
    response = respond(blanks, pieces, stop=[stop])
    assert response.text == text
    assert response.nfe == response.tokens == steps


@pytest.mark.parametrize("text", ["    return x\n", "\n\n\tif a:\n\t\tb\n\n", " ", "\n", "", " a "])
def test_white_space_is_part_of_a_response(merging, text):
    assert respond(merging, [text, "<|endoftext|>"]).text == text
    assert respond(merging, [text, "END.", "a"], stop=["END"]).text == text


def test_the_first_of_several_stop_strings_counts(merging):
    assert respond(merging, ["a", "b", ";\n\n"], stop=["\n\n", ";\n", "b;"]).text == "a"


@pytest.mark.parametrize("attribute", ["windowed", "flash"])
def test_a_cache_that_the_attention_cannot_follow_is_refused_before_the_first_forward(small_model, attribute):
    setattr(small_model, attribute, True)
    with pytest.raises(ValueError, match=r"sampling\.cache"):
        generate(small_model, builtin_tokenizer(), [[70]], SamplingConfig(max_new_tokens=4, cache="dual"))
