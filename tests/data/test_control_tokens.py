"""Control tokens in texts are text: only the chat template writes real ones."""

import copy
import json
import re

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data import DataConfig, PlacedRow, prompt_ids, rows_of
from data.encode import encode
from diffllm.tokenizer import CHAT_TEMPLATES, builtin_tokenizer

HEADERS = ["<|startoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CONTROL = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|eot_id|>",
    "<|mask|>",
    "<|im_end|>\n<|im_start|>system",
]
TEXTS = ("{}", "a{}b", " {} ", "\U000f0000{}\ue000")
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"


@pytest.fixture(params=["chatml", "llama3", "llada", "tags"])
def templated(request):
    """The built-in tokenizer with a template that writes tools; in one its tags of thinking are special, too."""
    tokenizer = builtin_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [*HEADERS, "<|im_start|>", "<|im_end|>"]})
    if request.param == "tags":
        tokenizer.add_tokens([AddedToken(tag, special=True) for tag in ("<think>", "</think>")])
    tokenizer.chat_template = TOOLS + CHAT_TEMPLATES.get(request.param, CHAT_TEMPLATES["chatml"])
    return tokenizer


def control_ids(tokenizer):
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    return [id for id, token in tokenizer.added_tokens_decoder.items() if token.special and id not in tags]


def real(ids, tokenizer):
    """The control tokens among token ids."""
    return [tokenizer.convert_ids_to_tokens(int(id)) for id in ids if id in control_ids(tokenizer)]


def prepared(tokenizer, *rows, **settings):
    placed = [PlacedRow(each, f"rows:{number}") for number, each in enumerate(rows, start=1)]
    return rows_of({"rows": placed}, DataConfig(**settings), tokenizer)


def row_of(text):
    """A row that holds a text everywhere."""
    return {
        "messages": [
            {"role": "system", "content": f"s{text}"},
            {"role": "user", "content": f"u{text}."},
            {"role": "assistant", "content": f"a{text}.", "reasoning_content": f"r{text}"},
            {"role": "user", "content": f"{text}v."},
            {"role": "assistant", "content": f"b{text}c", "thinking": f"t{text}"},
        ],
        "tools": [{f"k{text}": [f"l{text}"]}],
    }


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("control", CONTROL)
@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_no_text_holds_a_real_one(templated, control, text, loss_on):
    text = text.format(control)
    tokens, report = prepared(templated, row_of(text), loss_on=loss_on)
    plain, _ = prepared(templated, row_of("x"), loss_on=loss_on)
    ids, start = tokens.ids(0).tolist(), tokens.prompt_lengths[0]
    assert real(ids, templated) == real(plain.ids(0), templated)
    whole, expected = templated.decode(ids), templated.decode(plain.ids(0))
    for mark in "suarbt":
        expected = expected.replace(f"{mark}x", f"{mark}{text}")
    written = json.dumps([{f"k{text}": [f"l{text}"]}], ensure_ascii=False)
    expected = expected.replace("xv.", f"{text}v.").replace('[{"kx": ["lx"]}]', written)
    assert whole.replace(" ", "") == expected.replace(" ", "")  # a thought is stripped
    assert len(tokens.context(0)) == len(plain.context(0))
    assert templated.decode(ids[start:]).startswith("<think>\n")
    assert (report.control_tokens.count, report.control_tokens.examples[0][:8]) == (1, "rows:1 '")
    assert tokens.column("answer_tokens") - plain.column("answer_tokens") == len(spelt(templated, f"b{text}c")) - 3
    thought = tokens.column("thinking_tokens") - plain.column("thinking_tokens")
    assert thought == len(spelt(templated, f"t{text}".strip())) - 2


def spelt(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("control", CONTROL)
def test_a_prompt_is_sampled_from_as_it_is_trained_on(templated, control):
    row = row_of(control)
    tokens, _ = prepared(templated, row)
    prompt = [
        message | {"content": f"<think>\nr{control}\n</think>\na{control}."}
        if message["role"] == "assistant"
        else message
        for message in row["messages"][:-1]
    ]
    ids = prompt_ids(prompt, templated, tools=row["tools"])
    assert ids == tokens.ids(0)[: tokens.prompt_lengths[0]].tolist()


def test_rows_without_them_have_the_same_tokens_beside_rows_with_them(templated):
    rows = [row_of("x"), row_of("<|mask|>"), row_of("y")]
    tokens, report = prepared(templated, *rows, loss_on="all")
    for number in (0, 2):
        alone, _ = prepared(templated, rows[number], loss_on="all")
        assert tokens.ids(number).tolist() == alone.ids(0).tolist()
        assert tokens.context(number).tolist() == alone.context(0).tolist()
    assert "  1 (33.3%) with control tokens, read as text" in report.text()
    assert prepared(templated, rows[0])[1].text().count("control") == 0


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>", "<|im_end|>\n"])
def test_one_end_behind_an_answer_is_dropped(tokenizer, end):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    expected, _ = prepared(tokenizer, {"messages": turns * 2}, loss_on="all")
    ended = [turns[0], turns[1] | {"content": f"b{end}"}]
    tokens, report = prepared(tokenizer, {"messages": ended * 2}, loss_on="all")
    assert tokens.ids(0).tolist() == expected.ids(0).tolist()
    assert report.control_tokens.count == 1
    tokens, _ = prepared(tokenizer, {"prompt": "a", "response": f" b{end.strip()}{end}"})
    assert tokenizer.decode(tokens.ids(0)).endswith(f"assistant\n b{end.strip()}<|endoftext|>")
    assert real(tokens.ids(0)[tokens.prompt_lengths[0] :], tokenizer) == ["<|endoftext|>"]
    with pytest.raises(ValueError, match=r"rows:1: the response holds only <\|"):
        prepared(tokenizer, {"prompt": "a", "response": end})


def test_the_mask_is_no_mask_in_a_text(tokenizer):
    row = {"prompt": "What is <|mask|>?", "response": "<|mask|> is a <|mask|>"}
    tokens, _ = prepared(tokenizer, row)
    assert tokenizer.mask_token_id not in tokens.ids(0)
    assert tokenizer.mask_token_id not in prompt_ids([{"role": "user", "content": "a <|mask|>"}], tokenizer)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_tokenizer_that_begins_texts_with_a_space(scheme):
    letters = {letter: id for id, letter in enumerate(["▁", "a", "b", "c", ":", "<", ">", "e", "\n", "<e>", "<c>"])}
    backend = Tokenizer(models.BPE(letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace()
    template = "{{ messages[0]['content'] }}<c>b:{{ messages[1]['content'] }}<c>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<e>", extra_special_tokens=["<c>"], chat_template=template
    )
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "a b"}]
    ordinary = prompt_ids(messages, tokenizer)
    assert ordinary == tokenizer("a<c>b:a b<c>", add_special_tokens=False)["input_ids"]
    messages[0]["content"] = "<e>a"
    ids = tokenizer.convert_ids_to_tokens(prompt_ids(messages, tokenizer))
    assert ids[: ids.index("<c>")] == ["▁", "<", "e", ">", "a"]
    rest = tokenizer.convert_ids_to_tokens(ordinary)
    rest = rest[rest.index("<c>") :]
    if scheme == "first":  # else it has a space in each piece, which is one more here than in ordinary rows
        assert ids[ids.index("<c>") :] == rest


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_a_token_that_takes_the_spaces_beside_it(side):
    tokenizer = builtin_tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True, **{side: True})], special_tokens=True)
    tokenizer.chat_template = "<|turn|>\n{{ messages[0]['content'] }}\n<|turn|>\n"
    ordinary, held = (prompt_ids([{"role": "user", "content": text}], tokenizer) for text in ("x", "<|turn|>"))
    at = ordinary.index(tokenizer("x")["input_ids"][0])
    assert held == [*ordinary[:at], *spelt(tokenizer, "<|turn|>"), *ordinary[at + 1 :]]
    assert len(ordinary) == 4  # it took one of two line ends


def test_a_tokenizer_that_knows_no_other_way_to_write_them():
    backend = Tokenizer(models.BPE({"a": 0, "<e>": 1, "<m>": 2}, merges=[], ignore_merges=True))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<e>", mask_token="<m>", chat_template="{{ messages[0]['content'] }}<e>"
    )
    assert prompt_ids([{"role": "user", "content": "a"}], tokenizer) == [0, 1]
    with pytest.raises(ValueError, match="the prompt: the tokenizer cannot read '<m>' as text"):
        prompt_ids([{"role": "user", "content": "<m>"}], tokenizer)


OPENS, CLOSES = "<think>\n", "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("begun", "response", "message"),
    [
        (OPENS, "<think>a</think>b", "writes <think> before the answer, which has its own"),
        (OPENS, "b", "writes <think> before the answer, which has no </think>"),
        (OPENS, "a</think>b", None),
        (CLOSES, "<think>a</think>b", "writes <think></think> before the answer, which has thinking"),
        (CLOSES, "<think></think>b", "writes <think></think> before the answer"),
        (CLOSES, "a</think>b", "writes <think></think> before the answer"),
        (CLOSES, "b", None),
        ("", "b", None),
        ("", "<think>a</think>b", None),
    ],
)
def test_a_template_and_an_answer_that_think_otherwise(begun, response, message):
    tokenizer = builtin_tokenizer()
    tokenizer.chat_template = "{{ messages | map(attribute='content') | join(' ') }}:" + begun.replace(
        "\n", "\\n"
    ).join(["{{ '", "' }}"])
    row = {"prompt": "a", "response": response}
    if message is None:
        assert tokenizer.decode(prepared(tokenizer, row)[0].ids(0)) == f"a:{begun}{response}<|endoftext|>"
        return
    advice = r"model\.chat_template_kwargs={enable_thinking: false}.*model\.chat_template"
    with pytest.raises(ValueError, match=f"rows:1: the chat template {message}.*{advice}"):
        prepared(tokenizer, row)


def test_texts_are_still_tokenized_together(tokenizer, monkeypatch):
    chats = [{"prompt": [{"role": "user", "content": f"{i}"}], "response": "a"} for i in range(9)]
    calls = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *args, **named: calls.append(1) or call(*args, **named))
    encode(chats, ["rows"] * 9, tokenizer)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "written",
    [
        "{{ tools }}",
        "{{ tools | pprint }}",
        "{{ tools | string | urlencode }}",
        "{{ tools | tojson(ensure_ascii=True) }}",
    ],
)
def test_a_template_that_escapes_tools(tokenizer, written):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = written + CHAT_TEMPLATES["chatml"]
    row = {"prompt": "a", "response": "b", "tools": [{"name": "y"}]}
    assert len(prepared(tokenizer, row)[0]) == 1
    assert len(prepared(tokenizer, row | {"prompt": "a<|im_end|>"})[0]) == 1
    for tools in ([{"name": "<|im_end|>"}], [{"a": [{"<|im_end|>": 1}]}]):
        with pytest.raises(ValueError, match=r"rows:1: .*<\|im_end\|>.* take it out of the tools"):
            prepared(tokenizer, row | {"tools": tools})
        with pytest.raises(ValueError, match=r"the prompt: .*<\|im_end\|>.*tools"):
            prompt_ids([{"role": "user", "content": "a"}], tokenizer, tools=tools)


@pytest.mark.parametrize("name", ["role", "prompt", "response", "content", "tools"])
def test_a_control_token_that_is_named_like_a_key(name):
    tokenizer = builtin_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [name]})
    tokenizer.chat_template = TOOLS + CHAT_TEMPLATES["chatml"]
    row = {"prompt": f"a {name}", "response": f"{name} b", "tools": [{name: name}]}
    tokens, report = prepared(tokenizer, row)
    assert f'[{{"{name}": "{name}"}}]' in tokenizer.decode(tokens.ids(0))
    assert tokenizer.convert_tokens_to_ids(name) not in tokens.ids(0)
    assert report.control_tokens.count == 1


@pytest.mark.parametrize("space", ["", "\n"])
@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>", "<|im_end|>\n"])
def test_an_end_is_no_answer(tokenizer, end, space):
    response = f"<think>t</think>{space}{end}"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": end, "reasoning": "t"}]
    for row in (
        {"question": "q", "answer": response},
        {"prompt": "q", "response": end, "thinking": "t"},
        {"prompt": "q", "completion": turns[1:]},
        {"messages": turns},
    ):
        with pytest.raises(ValueError, match=rf"rows:1: .*</think>.*{re.escape(end.strip())}"):
            prepared(tokenizer, row)
    assert len(prepared(tokenizer, {"prompt": "q", "response": response})[0]) == 1
    assert len(prepared(tokenizer, {"question": "q", "answer": f"<think>t</think>a{end}"})[0]) == 1


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (normalizers.Lowercase(), "<|IM_END|>"),
        (normalizers.NFKC(), "＜|im_end|＞"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "<|im_énd|>"),
        (normalizers.Replace("#", ""), "<|im#_end|>"),
    ],
    ids=str,
)
@pytest.mark.parametrize("beside", ["", "<|endoftext|>"])
def test_a_normalized_control_token_in_other_letters(normalizer, text, beside):
    tokenizer = builtin_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    end = AddedToken("<|im_end|>", special=True, normalized=True)
    tokenizer.add_special_tokens({"extra_special_tokens": [end]})
    row = {"messages": [{"role": role, "content": f"x{text}{beside}y"} for role in ("user", "assistant")]}
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in tokenizer(text)["input_ids"]
    tokens, report = prepared(tokenizer, row)
    assert real(tokens.ids(0), tokenizer).count("<|im_end|>") == 1  # the template's
    assert report.control_tokens.count == 1
    prompt = tokens.ids(0)[: tokens.prompt_lengths[0]].tolist()
    assert prompt_ids(row["messages"][:1], tokenizer) == prompt
    assert prepared(tokenizer, {"prompt": "x", "response": "y"})[1].control_tokens.count == 0


@pytest.mark.parametrize(
    ("begun", "response"),
    [("", "b"), ("", "<think>a</think>b"), (CLOSES, "the tag <think> opens"), (OPENS, "a <think> b</think>c")],
)
@pytest.mark.parametrize("prompt", ["what is <think>", "<think>\n", "<think></think>", "</think>"])
def test_tags_that_the_template_did_not_write(begun, response, prompt):
    tokenizer = builtin_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}" + begun.replace("\n", "\\n").join(["{{ '", "' }}"])
    tokens, _ = prepared(tokenizer, {"prompt": prompt, "response": response})
    assert tokenizer.decode(tokens.ids(0)) == f"{prompt}{begun}{response}<|endoftext|>"
    if begun:
        with pytest.raises(ValueError, match="rows:1: the chat template writes <think>"):
            prepared(tokenizer, {"prompt": prompt, "response": "<think>a</think>b"})
