"""Bodies that the server refuses, and lives on."""

import json

import httpx2
import openai
import pytest

from sampling import SamplingConfig
from tests.launch.serve.serving import ASK, NAME, SMALL, serving

LIMIT = 20_000


@pytest.fixture(scope="module")
def served():
    with serving(max_body=LIMIT) as running:
        yield running
        assert running.post({"messages": ASK}).status_code == 200


def assert_refused(reply: httpx2.Response, status: int, param: str | None, code: str | None = None) -> None:
    """As OpenAI writes errors."""
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"text"', b'{"a": NaN}', b"\xff", b"[" * 10_000, b'{"a": "\\ud800"}', b"1" * 5000],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_no_json_object(served, body):
    assert_refused(served.post(body), 400, None)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temprature": 1}, "temprature", "unknown_field"),
        ({"best_of": 1}, "best_of", "unknown_field"),
        ({"n": 2}, "n", "unsupported_field"),
        ({"n": True}, "n", "unsupported_field"),
        ({"logprobs": True}, "logprobs", "unsupported_field"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "unsupported_field"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_field"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_field"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_field"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_field"),
        ({"stream": "yes"}, "stream", None),
        ({"stream_options": []}, "stream_options", None),
        ({"drafts": True}, "drafts", None),
        ({"temperature": -1}, "temperature", None),
        ({"temperature": "1"}, "temperature", None),
        ({"top_p": 0}, "top_p", None),
        ({"seed": 1.5}, "seed", None),
        ({"seed": 2**64}, "seed", None),
        ({"steps": 0}, "steps", None),
        ({"steps": True}, "steps", None),
        ({"steps": 10**6}, "steps", None),
        ({"alg": "entropi"}, "alg", None),
        ({"remask": 0.1, "transfer": "threshold"}, "remask", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_completion_tokens": 0}, "max_completion_tokens", None),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", None),
        ({"max_tokens": 3, "min_new_tokens": 4}, "min_new_tokens", None),
        ({"max_tokens": 2048}, "max_tokens", "context_length_exceeded"),
        ({"max_completion_tokens": 2**63 - 1}, "max_completion_tokens", "context_length_exceeded"),
        ({"batch_size": 1}, "batch_size", None),
        ({"compile": "true"}, "compile", None),
        ({"stop": ""}, "stop", None),
        ({"stop": 1}, "stop", None),
        ({"stop": ["a"] * 17}, "stop", None),
        ({"forbidden": ["ab cd"]}, "forbidden", None),
        ({"messages": None}, "messages", None),
        ({"messages": []}, "messages", None),
        ({"messages": "Hi"}, "messages", None),
        ({"messages": ["Hi"]}, "messages[0]", None),
        ({"messages": [{"role": "user", "content": " "}]}, "messages", None),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].role", None),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "messages[0].role", None),
        ({"messages": [*ASK, {"role": "user"}]}, "messages[1].content", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", None),
        ({"messages": [{**ASK[0], "tool_calls": [1]}]}, "messages[0].tool_calls", "unsupported_field"),
        ({"messages": [{**ASK[0], "rolle": 1}]}, "messages[0].rolle", "unknown_field"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_wrong_field(served, fields, param, code, stream):
    reply = served.post(json.dumps({"messages": ASK, "stream": stream and "drafts" not in fields} | fields).encode())
    assert_refused(reply, 400, param, code)


@pytest.mark.parametrize(
    ("fields", "begins", "ends"),
    [
        ({"x" * 10_000: 1}, "xxx", " more"),
        ({"model": "x" * 10_000}, "model=xxx", NAME),
        ({"seed": 10**400}, "seed=1000", "e+18"),
        ({"forbidden": ["ab" * 1000]}, "forbidden=['abab", "]"),
    ],
    ids=["name", "model", "seed", "forbidden"],
)
def test_an_error_does_not_repeat_long_texts(served, fields, begins, ends):
    reply = served.post({"messages": ASK} | fields)
    error = reply.json()["error"]
    assert reply.status_code in (400, 404)
    assert error["message"].startswith(begins)
    assert error["message"].endswith(ends)
    assert len(reply.content) < 3000


def test_a_number_beyond_all_bounds(served):
    body = json.dumps({"messages": ASK, "temperature": 0.125}).replace("0.125", "1e999")
    assert_refused(served.post(body.encode()), 400, "temperature")


@pytest.mark.parametrize("prompt", [None, "", [], ["a", "b"], [[1], [2]], [1.5], [True], [-1], [10**9], {"a": 1}])
def test_a_wrong_prompt(served, prompt):
    assert_refused(served.post({"prompt": prompt}, "/v1/completions"), 400, "prompt")


def test_the_mask_token_is_no_prompt(served):
    assert_refused(served.post({"prompt": "a<|mask|>"}, "/v1/completions"), 400, "prompt")
    chat = [{"role": "user", "content": "a<|mask|>"}]  # is read as text
    assert served.post({"messages": chat}).status_code == 200


def test_nearest_names(served):
    """A field of one address is not one of the other."""
    for field, meant in (("temprature", "temperature"), ("zzzz", "messages, model"), ("max_token", "max_tokens")):
        message = served.post({"messages": ASK, field: 1}).json()["error"]["message"]
        assert meant in message
    assert_refused(served.post({"prompt": "a", "messages": ASK}, "/v1/completions"), 400, "messages", "unknown_field")
    assert_refused(served.post({"prompt": "a", "suffix": "b"}, "/v1/completions"), 400, "suffix", "unsupported_field")


def test_neutral_values_are_taken(served):
    neutral = {"n": 1, "logprobs": False, "top_logprobs": 0, "tools": [], "logit_bias": {}, "frequency_penalty": 0.0}
    neutral |= {"user": "me", "metadata": {"a": 1}, "response_format": {"type": "text"}, "audio": None}
    neutral |= {"batch_size": SMALL.batch_size, "max_tokens": 8, "max_completion_tokens": 8, "max_new_tokens": 8}
    parts = [{"type": "text", "text": "Solve "}, {"type": "text", "text": "3x+5=20"}]
    message = {"role": "user", "content": parts, "tool_calls": None, "refusal": None}
    plain, same = (served.post(body).json() for body in ({"messages": ASK}, {"messages": [message], **neutral}))
    assert same["choices"] == plain["choices"]


def test_a_developer_is_the_system(served):
    chats = [[{"role": role, "content": "Be brief."}, *ASK] for role in ("system", "developer")]
    first, second = (served.post({"messages": chat}).json()["choices"] for chat in chats)
    assert first == second


def test_unknown_models_and_addresses(served):
    assert_refused(served.post({"messages": ASK, "model": "gpt-4"}), 404, "model", "model_not_found")
    assert_refused(served.http.get("/v1/models/gpt-4"), 404, None, "model_not_found")
    assert_refused(served.http.get("/v1/nothing"), 404, None)
    assert_refused(served.http.get("/v1/completions"), 405, None)
    assert_refused(served.http.get("/metrics/"), 404, None)
    assert_refused(served.post({"messages": ASK}, "/v1/chat/completions/"), 404, None)
    with pytest.raises(openai.NotFoundError):
        served.client.chat.completions.create(model="gpt-4", messages=ASK)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_long_body_is_not_read_whole(served, chunked):
    sent = 0

    def parts():
        nonlocal sent
        for _ in range(1000):
            sent += 10_000
            yield b"x" * 10_000

    headers = {} if chunked else {"content-length": "10000000"}
    reply = served.http.post("/v1/completions", content=parts(), headers=headers)
    assert_refused(reply, 413, None, "body_too_long")
    assert sent < 10_000_000
    assert served.metric('diffllm_requests_total{status="413"}') > 0


def test_a_body_at_the_limit(served):
    body = json.dumps({"messages": ASK}).encode()
    assert served.post(body + b" " * (LIMIT - len(body))).status_code == 200
    assert_refused(served.post(body + b" " * (LIMIT + 1 - len(body))), 413, None, "body_too_long")


def test_a_model_without_a_chat_template():
    with serving(chats=False) as served:
        assert_refused(served.post({"messages": ASK}), 400, "messages")
        reply = served.post({"prompt": "2+3="}, "/v1/completions").json()
        assert reply["choices"][0]["text"] == served.alone("2+3=", SamplingConfig(max_new_tokens=8)).text
