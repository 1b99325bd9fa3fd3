"""The built-in tokenizer, and what no tokenizer may lack."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.encode import prompt_ids
from data.token_cache import tokenizer_digest
from diffllm.tokenizer import (
    builtin_tokenizer,
    check_tokenizer,
    load_tokenizer,
    save_tokenizer,
    set_chat_template,
    set_template_variables,
)

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


def render(template, generation=True):
    """Text of a chat in a named template, with a tokenizer that has its tokens."""
    tokenizer = builtin_tokenizer()
    markers = ("<|begin_of_text|>", "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    set_chat_template(tokenizer, template)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi\n"}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=generation, tokenize=False)


@pytest.mark.parametrize(("template", "start"), [("llama3", "<|begin_of_text|>"), ("llada", "<|startoftext|>")])
def test_templates_with_headers(template, start):
    """As Llama 3 and LLaDA are published."""
    chat = (
        f"{start}<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    )
    assert render(template, generation=False) == chat
    assert render(template) == chat + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def write_dream_tokenizer(directory):
    """As it is published, but with a letter a token: vocab.json, merges.txt and the name of a class that is not run."""
    vocab = json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]["vocab"]
    base = {token: id for token, id in vocab.items() if len(token) == 1}
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(base)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    special = {str(256 + i): {"content": text, "special": True} for i, text in enumerate(("<|endoftext|>", "<|mask|>"))}
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": special,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_gemmas_template_has_the_system_in_the_first_turn():
    tokenizer = builtin_tokenizer()
    with pytest.raises(ValueError, match=r"model\.chat_template=gemma: the tokenizer has no <bos>, <end_of"):
        set_chat_template(tokenizer, "gemma")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<bos>", "<start_of_turn>", "<end_of_turn>"]})
    set_chat_template(tokenizer, "gemma")
    roles = zip(("system", "user", "assistant", "user"), ("Be brief.", "2+2?", "4", "3+3?"), strict=True)
    messages = [{"role": role, "content": content} for role, content in roles]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<bos><start_of_turn>user\nBe brief.\n\n2+2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n"
        "<start_of_turn>user\n3+3?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert "system" not in tokenizer.apply_chat_template(messages[1:], tokenize=False)


def test_dreams_tokenizer_loads_as_it_is_published(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "Dream"}')
    tokenizer = load_tokenizer(write_dream_tokenizer(tmp_path))
    assert tokenizer.decode(tokenizer("Hi é")["input_ids"]) == "Hi é"
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, len(tokenizer)) == (257, 256, 258)


def test_a_saved_tokenizer_names_what_transformers_4_knows(tmp_path):
    save_tokenizer(TOKENIZER, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert again.decode(again("<|im_start|>Hi")["input_ids"], skip_special_tokens=True) == "Hi"


def test_what_a_tokenizer_needs():
    check_tokenizer(TOKENIZER, TOKENIZER.mask_token_id, len(TOKENIZER))
    with pytest.raises(ValueError, match="no mask token"):
        check_tokenizer(TOKENIZER, None, len(TOKENIZER))
    with pytest.raises(ValueError, match=r"has the mask '<\|mask\|>', token 1253, but the model has token 5"):
        check_tokenizer(TOKENIZER, 5, len(TOKENIZER))
    nameless = builtin_tokenizer()
    nameless.mask_token = None
    check_tokenizer(nameless, 5)
    with pytest.raises(ValueError, match="as mask and as padding or end"):
        check_tokenizer(nameless, TOKENIZER.pad_token_id, len(TOKENIZER))
    with pytest.raises(ValueError, match="smaller than the 1256 tokens"):
        check_tokenizer(TOKENIZER, TOKENIZER.mask_token_id, 1000)


CHAT = [{"role": "user", "content": "Hi"}]
TEMPLATES = {
    "qwen": "{%- for message in messages %}{{ message.content }}{% endfor %}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{%- endif %}",
    "llama": "{%- if not enable_thinking is defined %}\n  {%- set enable_thinking = true %}\n{%- endif %}"
    "{{ messages[0].content }}{{ '' if enable_thinking else '<think></think>' }}",
    "macro": "{% macro end() %}{% if enable_thinking == false %}<think></think>{% endif %}{% endmacro %}"
    "{% for message in messages %}{{ message['content'] }}{{ end() }}{% break %}{% endfor %}",
    "marked": "{% for message in messages %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{{ '<think></think>' if enable_thinking is false }}{% endfor %}",
}


def templated(template):
    tokenizer = builtin_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def text_of(tokenizer, **variables):
    return tokenizer.apply_chat_template(CHAT, tokenize=False, **variables)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_variable_of_the_template_reaches_all_that_renders_it(template, tmp_path):
    tokenizer = templated(template)
    digest = tokenizer_digest(tokenizer)
    assert text_of(tokenizer) == "Hi"
    set_template_variables(tokenizer, {"enable_thinking": False})
    assert tokenizer_digest(tokenizer) != digest
    save_tokenizer(tokenizer, tmp_path)
    for each in (tokenizer, load_tokenizer(tmp_path)):
        assert text_of(each) == "Hi<think></think>"
        assert each.decode(prompt_ids(CHAT, each)) == "Hi<think></think>"
        assert text_of(each, enable_thinking=True) == "Hi"
        set_template_variables(each, {"enable_thinking": True})  # the last one counts
        assert text_of(each) == "Hi"


def test_no_variables_leave_the_template_alone():
    tokenizer = templated(None)
    set_template_variables(tokenizer, {})
    assert tokenizer.chat_template is None


@pytest.mark.parametrize("begin", ["", "\n", "\n\n", "  ", "\t{% if x %}{% endif %}\n", "{#- a -#}\n a"])
def test_a_template_begins_as_it_did(begin):
    tokenizer = templated(begin + "{{ messages[0].content }}{{ x }}")
    before = text_of(tokenizer, x=1)
    set_template_variables(tokenizer, {"x": 1})
    assert text_of(tokenizer) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
)


@settings(deadline=None)
@given(JSON)
def test_a_variable_may_have_any_value_of_json(value):
    tokenizer = templated("{{ x | tojson }}{{ messages[0].content }}")
    set_template_variables(tokenizer, {"x": value})
    assert json.loads(text_of(tokenizer).removesuffix("Hi")) == value


def test_several_templates_all_get_the_variables():
    tokenizer = templated({"default": TEMPLATES["qwen"], "tool_use": "{{ enable_thinking }}", "rag": "-"})
    set_template_variables(tokenizer, {"enable_thinking": False})
    assert text_of(tokenizer) == "Hi<think></think>"
    assert text_of(tokenizer, chat_template="tool_use") == "False"
    assert text_of(tokenizer, chat_template="rag") == "-"


@pytest.mark.parametrize(
    ("template", "values", "words"),
    [
        (TEMPLATES["qwen"], {"enable_thinkin": False}, ["'enable_thinkin'", "enable_thinking"]),
        (TEMPLATES["qwen"], {"tone": 1}, ["'tone'", "enable_thinking"]),
        (TEMPLATES["qwen"], {"messages": []}, ["'messages'"]),
        (TEMPLATES["qwen"], {"a b": 1}, ["'a b'"]),
        ("{{ bos_token }}{{ tools }}{{ messages }}", {"bos_token": "x"}, ["'bos_token'", "nothing but the messages"]),
        ("{{ bos_token }}{{ tools }}{{ messages }}", {"tools": []}, ["'tools'"]),
        ("{{ messages }}{{ add_generation_prompt }}", {"add_generation_prompt": False}, ["'add_generation_prompt'"]),
        ("{% set x = 1 %}{{ x }}{{ messages }}", {"x": 2}, ["'x'"]),
        ("{{ strftime_now('%Y') }}{{ raise_exception() }}", {"strftime_now": "2024"}, ["'strftime_now'"]),
        ("{{ x }}", {"x": float("inf")}, ["inf cannot be written"]),
        ("{{ x }}", {"x": [{"a": object}]}, ["class 'object'", "cannot be written"]),
        ("{% if x %}", {"x": 1}, ["the chat template cannot be read", "endif"]),
        (None, {"x": 1}, ["no chat template", "model.chat_template"]),
    ],
    ids=str,
)
def test_variables_that_a_template_does_not_take(template, values, words):
    with pytest.raises(ValueError, match="chat") as refusal:
        set_template_variables(templated(template), values)
    assert "\n" not in str(refusal.value)
    for word in words:
        assert word in str(refusal.value)
