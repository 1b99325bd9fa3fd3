"""The built-in tokenizer, and what no tokenizer may lack."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffllm.tokenizer import builtin_tokenizer, check_tokenizer

TOKENIZER = builtin_tokenizer()


@given(st.text())
def test_any_text_goes_through(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_numbers_and_special_tokens_are_single_tokens():
    tokens = TOKENIZER.tokenize("<think>12+999=1011</think><|mask|>")
    assert tokens == ["<think>", "12", "+", "999", "=", "1", "0", "1", "1", "</think>", "<|mask|>"]


def test_chat_template_is_chatml():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_a_tokenizer_needs():
    check_tokenizer(TOKENIZER, TOKENIZER.mask_token_id, len(TOKENIZER))
    with pytest.raises(ValueError, match="no mask token"):
        check_tokenizer(TOKENIZER, None, len(TOKENIZER))
    with pytest.raises(ValueError, match="as mask and as padding"):
        check_tokenizer(TOKENIZER, TOKENIZER.pad_token_id, len(TOKENIZER))
    with pytest.raises(ValueError, match="smaller than the 1256 tokens"):
        check_tokenizer(TOKENIZER, TOKENIZER.mask_token_id, 1000)
