"""Answers of the server are those of sample.py, in one piece and as streams."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from sampling import SamplingConfig
from tests.launch.serve.serving import ASK, NAME, SMALL, Served, serving


@pytest.fixture(scope="module")
def served():
    with serving() as running:
        yield running


SETTINGS = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 2},
    {"temperature": 1.0, "top_p": 0.9, "alg": "topk_margin"},
    {"steps": 3, "transfer": "even"},
    {"block_length": 4, "cache": "dual"},
    {"cfg_scale": 0.5, "alg": "maskgit_plus"},
    {"temperature": 0.7, "remask": 0.3, "steps": 12},
    {"transfer": "threshold", "threshold": 0.2},
    {"max_new_tokens": 3},
    {"stop": ["e", "1"]},
]


def asked(served: Served, prompt, settings: dict, **more):
    """The server's response to a chat, or to a text."""
    known = {name: settings[name] for name in ("temperature", "top_p", "seed", "stop") if name in settings}
    extra = {name: value for name, value in settings.items() if name not in known} | more.pop("extra", {})
    if isinstance(prompt, str):
        return served.client.completions.create(model=NAME, prompt=prompt, **known, extra_body=extra, **more)
    return served.client.chat.completions.create(model=NAME, messages=prompt, **known, extra_body=extra, **more)


def test_many_clients(served):
    """200 requests of 32 clients, each with the answer that it would have had alone."""
    prompts = [ASK, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, *ASK], "2+3=", "x" * 40]
    questions = [(prompt, settings) for prompt in prompts for settings in SETTINGS]
    expected = [served.alone(prompt, replace(SMALL, **settings)) for prompt, settings in questions]

    def check(number: int) -> None:
        prompt, settings = questions[number % len(questions)]
        alone, reply = expected[number % len(questions)], asked(served, prompt, settings)
        [choice] = reply.choices
        text = choice.text if isinstance(prompt, str) else choice.message.content
        assert (text, choice.finish_reason == "stop") == (alone.text, alone.ended)
        assert (reply.usage.completion_tokens, reply.nfe) == (alone.tokens, alone.nfe)
        assert reply.tokens_per_forward == alone.tokens_per_forward

    before = served.metric('diffllm_requests_total{status="200"}')
    with ThreadPoolExecutor(32) as clients:
        assert len([*clients.map(check, range(200))]) == 200
    assert served.metric('diffllm_requests_total{status="200"}') == before + 200
    assert served.metric("diffllm_running_rows") == served.metric("diffllm_queue_length") == 0
    assert len({each.text for each in expected}) > 15


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("prompt", [ASK, "2+3="], ids=["chat", "text"])
def test_streams(served, settings, prompt):
    """The parts make up the whole, and end as the API says."""
    whole = asked(served, prompt, settings)
    parts = [*asked(served, prompt, settings, stream=True, stream_options={"include_usage": True})]
    *content, last = parts
    if isinstance(prompt, str):
        text = "".join(part.choices[0].text for part in content)
        assert text == whole.choices[0].text
    else:
        assert content[0].choices[0].delta.role == "assistant"
        text = "".join(part.choices[0].delta.content or "" for part in content)
        assert text == whole.choices[0].message.content
    reasons = [part.choices[0].finish_reason for part in content]
    assert reasons == [*[None] * (len(content) - 1), whole.choices[0].finish_reason]
    assert (last.choices, last.usage, last.nfe) == ([], whole.usage, whole.nfe)
    assert len({part.id for part in parts}) == 1


def test_text_comes_before_the_end(served):
    """From left to right, text that is final is sent; masked again, none is."""

    def texts(settings: dict) -> int:
        stream = asked(served, ASK, {"alg": "left_to_right", "stop_at_eos": False} | settings, stream=True)
        return sum(bool(part.choices[0].delta.content) for part in stream)

    assert any(texts({}) > 1 for _ in range(9))  # on a busy machine one part may hold the text of many steps
    assert texts({"remask": 0.3, "steps": 16}) == 1


def test_drafts(served):
    """A draft is the canvas after a step: its text begins with what was sent, its masks fall to none."""
    settings = {"alg": "left_to_right", "transfer": "even", "forbidden": ["<|im_end|>", "<|endoftext|>"]}
    parts = [*asked(served, ASK, settings, stream=True, extra={"drafts": True})]
    drafts, sent = [], ""
    for part in parts:
        sent += part.choices[0].delta.content or ""
        if draft := getattr(part, "draft", None):
            drafts.append(draft)
            text = "".join(piece.get("text", "") for piece in draft["pieces"])
            assert text.rstrip("�").startswith(sent)
    masked = [sum(piece.get("masked", 0) for piece in draft["pieces"]) for draft in drafts]
    assert masked == sorted({*masked}, reverse=True)
    assert masked[-1] == 0
    assert [draft["nfe"] for draft in drafts] == [SMALL.max_new_tokens - count for count in masked]


def test_the_last_line_of_a_stream(served):
    lines = served.post({"messages": ASK, "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: "))["model"] == NAME for line in lines[:-2])


def test_html_is_text(served, monkeypatch):
    """No page is made of what a model writes."""
    text = '<script>alert("1")</script>\u2028\x00'
    decode = type(served.service.tokenizer).decode
    monkeypatch.setattr(
        type(served.service.tokenizer), "decode", lambda *given, **more: decode(*given, **more) and text
    )
    reply = served.post({"messages": ASK})
    assert reply.headers["content-type"] == "application/json"
    assert reply.json()["choices"][0]["message"]["content"] == text
    stream = served.post({"messages": ASK, "stream": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert "\x00" not in stream.text


def test_one_thread_uses_the_tokenizer(served, monkeypatch):
    """Some of its calls change it: another thread would find it changed."""
    own, threads = served.service.tokenizer, set()

    def watched(method):
        def call(tokenizer, *given, **more):
            if tokenizer is own:
                threads.add((method.__name__, threading.current_thread().name))
            return method(tokenizer, *given, **more)

        return call

    names = ("__call__", "decode", "convert_ids_to_tokens", "apply_chat_template")
    for name in names:
        monkeypatch.setattr(type(own), name, watched(getattr(type(own), name)))
    asked(served, "2+3=", {})
    parts = [*asked(served, ASK, {"alg": "left_to_right"}, stream=True, extra={"drafts": True})]
    assert parts[-1].choices[0].finish_reason
    assert {name for name, _ in threads} == {*names}
    assert {thread for _, thread in threads} == {"reader_0"}


def test_token_ids_are_a_prompt(served):
    ids = served.service.tokenizer("2+3=", add_special_tokens=False)["input_ids"]
    texts = {asked(served, "2+3=", {}).choices[0].text}
    for prompt in (ids, [ids], ["2+3="]):
        texts.add(served.post({"prompt": prompt}, "/v1/completions").json()["choices"][0]["text"])
    assert len(texts) == 1


def test_models_and_health(served):
    [model] = served.client.models.list().data
    assert (model.id, model.owned_by) == (NAME, "diffllm")
    assert served.client.models.retrieve(NAME) == model
    assert served.http.get("/health").json() == {"status": "ok"}


def test_a_null_is_the_servers_setting_or_none():
    """As the API says for its own fields, and as SamplingConfig says for the others."""
    with serving(SamplingConfig(max_new_tokens=8, steps=2, temperature=1.0, seed=7)) as other:
        settings = {"temperature": None, "top_p": None, "seed": None, "stop": None, "max_tokens": None}
        reply = other.post({"messages": ASK, **settings, "steps": None}).json()
        expected = other.alone(ASK, SamplingConfig(max_new_tokens=8, temperature=1.0, seed=7))
        assert reply["choices"][0]["message"]["content"] == expected.text
        assert other.post({"messages": ASK}).json()["nfe"] <= 2
