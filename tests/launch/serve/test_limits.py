"""A full queue, time-outs, clients that leave, models that fail, the end of the server."""

import asyncio
import itertools
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest

from data import prompt_ids
from launch.serve import exchange, server
from launch.serve.exchange import Exchange
from launch.serve.protocol import CHAT, ApiError
from tests.launch.serve.serving import ASK, NAME, SMALL, Served, serving, until

REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
STREAM = {"messages": ASK, "stream": True}


@pytest.fixture
def served():
    with serving(replace(SMALL, batch_size=2), queue=1) as running:
        yield running


def assert_idle_and_well(served: Served) -> None:
    """No canvas is left, and the next request is answered."""
    until(lambda: in_work(served) == 0)
    reply = served.post({"messages": ASK}).json()
    assert reply["choices"][0]["message"]["content"] == served.alone(ASK, SMALL).text


def in_work(served: Served) -> float:
    """Requests that are sampled or wait."""
    return served.metric("diffllm_running_rows") + served.metric("diffllm_queue_length")


def address(served: Served) -> tuple[str, int]:
    host, port = served.url.removeprefix("http://").split(":")
    return host, int(port)


def count(served: Served, status: int) -> float:
    return served.metric(f'diffllm_requests_total{{status="{status}"}}')


def test_a_full_queue(served):
    """Two are sampled, one waits, the fourth is refused; the three are answered."""
    with ThreadPoolExecutor(3) as clients:
        with served.gate.shut():
            replies = [clients.submit(served.post, {"messages": ASK}) for _ in range(3)]
            until(lambda: in_work(served) == 3)
            refused = served.post({"messages": ASK})
            with pytest.raises(openai.RateLimitError):
                served.client.chat.completions.create(model=NAME, messages=ASK, stream=True)
        assert [reply.result().status_code for reply in replies] == [200] * 3
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
    assert int(refused.headers["retry-after"]) > 0
    assert (count(served, 200), count(served, 429)) == (3, 2)
    assert_idle_and_well(served)


@pytest.mark.parametrize("body", [{"messages": ASK}, STREAM], ids=["whole", "stream"])
def test_a_time_out(body):
    with serving(timeout=0.2) as served:
        with served.gate.shut():
            reply = served.post(body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        until(lambda: served.metric("diffllm_running_rows") == 0)
        assert count(served, 504) == 1


def test_a_time_out_in_a_stream(monkeypatch):
    with serving(timeout=2.0) as served:
        hidden, forwards = served.model.hidden, itertools.count()

        def stuck(*arguments):
            if next(forwards) == 2:
                served.gate.open.clear()
            return hidden(*arguments)

        monkeypatch.setattr(served.model, "hidden", stuck)
        lines = served.post(STREAM).text.split("\n\n")
        served.gate.open.set()
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert "data: [DONE]" not in lines
        until(lambda: in_work(served) == 0)
        assert count(served, 504) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("running", [True, False], ids=["running", "waiting"])
def test_a_client_that_leaves(served, stream, running):
    """Its canvas is dropped, or its place in the queue."""
    fields = {"messages": ASK, "max_tokens": 1500, "stop_at_eos": False, "stream": stream, "drafts": stream}
    content = json.dumps(fields).encode()
    request = REQUEST % (len(content), content)
    with ThreadPoolExecutor(2) as clients, served.gate.shut():
        for _ in range(0 if running else 2):
            clients.submit(served.post, {"messages": ASK})
        until(lambda: in_work(served) == (0 if running else 2))
        with socket.create_connection(address(served)) as client:
            client.sendall(request)
            until(lambda: in_work(served) == (1 if running else 3))
            if stream and running:
                served.gate.open.set()
                assert b"200 OK" in client.recv(100)
        until(lambda: count(served, 499) == 1)
        served.gate.open.set()
        until(lambda: in_work(served) == 0)
    assert served.metric("diffllm_tokens_total") < 100
    assert_idle_and_well(served)


def test_a_client_that_leaves_before_its_body(served):
    with socket.create_connection(address(served)) as client:
        client.sendall(REQUEST % (100, b"{"))
    until(lambda: count(served, 499) == 1)
    assert_idle_and_well(served)


@pytest.mark.parametrize(
    "beginnings", [[], [b"GET /hea", b"lth HTTP/1.1\r\n"], [b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /h"]]
)
def test_a_request_without_a_whole_header(monkeypatch, beginnings):
    """Its connection is closed, after other requests too."""
    monkeypatch.setattr(server, "HEADER_SECONDS", 1)
    with serving() as served, socket.create_connection(address(served), 60) as client:
        for beginning in beginnings:
            client.sendall(beginning)
            if beginning.endswith(b"\r\n\r\n"):
                assert b"200 OK" in client.recv(10_000)
        until(lambda: not client.recv(10_000))


def test_a_request_may_take_longer_than_its_header(monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 1)
    with serving() as served, ThreadPoolExecutor(1) as clients:
        with served.gate.shut():
            reply = clients.submit(served.post, {"messages": ASK})
            with pytest.raises(TimeoutError):
                reply.result(2)
        assert reply.result().status_code == 200


def test_a_client_that_does_not_read(monkeypatch):
    """Counts as one that left."""
    monkeypatch.setattr(exchange, "WRITING", 0)
    monkeypatch.setattr(exchange, "draft", lambda *_: {"long": "x" * 10**6})
    with serving(replace(SMALL, max_new_tokens=60), timeout=3.0) as served, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address(served))
        body = json.dumps({"messages": ASK, "stream": True, "drafts": True, "stop_at_eos": False}).encode()
        client.sendall(REQUEST % (len(body), body))
        until(lambda: count(served, 499) == 1)
        assert in_work(served) == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError("out of memory; lower sampling.batch_size"), "MemoryError"),
        (FloatingPointError("not finite"), "FloatingPointError"),
        (RuntimeError("secret"), None),
    ],
    ids=["memory", "numbers", "other"],
)
def test_a_model_that_fails(served, error, code, stream, monkeypatch, capfd):
    """Ends the requests of its batch, and not those with other settings."""
    hidden = served.model.hidden

    def fail(x, *arguments):
        if x.shape[1] == len(prompt_ids(ASK, served.service.tokenizer)) + 6:
            raise error
        return hidden(x, *arguments)

    monkeypatch.setattr(served.model, "hidden", fail)
    failing = {"messages": ASK, "max_tokens": 6, "steps": 2, "stream": stream}
    with ThreadPoolExecutor(3) as clients:
        replies = [*clients.map(served.post, [failing, failing, {"messages": ASK}])]
    assert [reply.status_code for reply in replies] == [500, 500, 200]
    found = [reply.json()["error"] for reply in replies[:2]]
    assert [(each["type"], each["code"]) for each in found] == [("server_error", code)] * 2
    assert ("secret" in capfd.readouterr().err) == (code is None)
    assert "secret" not in str(found)
    assert_idle_and_well(served)


def test_a_model_that_fails_in_a_stream(served, monkeypatch):
    hidden, forwards = served.model.hidden, itertools.count()

    def fail(*arguments):
        if next(forwards) == 2:
            raise FloatingPointError("not finite")
        return hidden(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(served.model, "hidden", fail)
        with pytest.raises(openai.APIError) as caught:
            [*served.client.chat.completions.create(model=NAME, messages=ASK, stream=True)]
    assert caught.value.code == "FloatingPointError"
    assert count(served, 500) == 1
    assert_idle_and_well(served)


def test_a_server_that_fails(served, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(served.service, "encode", lambda *_: {}["secret"])
        reply = served.post({"messages": ASK})
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in reply.text
    assert "KeyError: 'secret'" in capfd.readouterr().err
    assert count(served, 500) == 1
    assert_idle_and_well(served)


def test_the_end_waits_for_running_requests(served):
    with ThreadPoolExecutor(1) as clients:
        with served.gate.shut():
            reply = clients.submit(served.post, STREAM)
            until(lambda: served.metric("diffllm_running_rows") == 1)
            served.server.should_exit = True
            until(lambda: not served.server.servers[0].is_serving())
        assert reply.result().text.endswith("data: [DONE]\n\n")


def test_the_end_does_not_wait_for_ever():
    with serving(shutdown=0.1) as served, ThreadPoolExecutor(1) as clients:
        body = {"messages": ASK, "max_tokens": 2000, "stop_at_eos": False}
        reply = clients.submit(served.post, body)
        until(lambda: served.metric("diffllm_running_rows") == 1)
        served.server.should_exit = True
        assert (reply.result().status_code, reply.result().json()["error"]["code"]) == (503, "server_stops")


def test_a_sampler_that_has_ended():
    with serving() as served:
        served.service.engine.close()
        assert served.http.get("/health").status_code == 503
        for body in ({"messages": ASK}, STREAM):
            reply = served.post(body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "sampler_ended")


def test_a_step_after_the_end_of_the_loop():
    async def exchange_of_a_loop() -> Exchange:
        return Exchange(None, None, CHAT)

    exchange = asyncio.run(exchange_of_a_loop())
    assert exchange.loop.is_closed()
    exchange._notify()
    assert not exchange.changed.is_set()


def test_errors_are_of_the_api():
    error = ApiError(429, "full", "n", "queue_full", retry_after="1")
    assert error.body == {"error": {"message": "full", "type": "rate_limit_error", "param": "n", "code": "queue_full"}}
    assert error.headers == {"retry-after": "1"}
