"""Samples for the page are those of sample.py, and end when nobody reads them."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from threading import Event, Lock

import pytest

from data import prompt_ids
from diffllm.generate import generate, response_of
from launch.playground import runs
from launch.playground.queue import Queue
from launch.playground.runs import Playground, Request, events_of, message_of
from sampling import SamplingConfig
from trainer.config import Config


@pytest.fixture
def config() -> Config:
    return Config(sampling=SamplingConfig(max_new_tokens=12, steps=6, temperature=1.0))


@pytest.fixture
def playground(small_model, tokenizer, config) -> Playground:
    return Playground(small_model, tokenizer, config, waiting=1)


def last(playground, request, *settings):
    *_, samples = playground.run(request, [("", each) for each in settings])
    return samples


def test_a_response_is_that_of_the_sampler(playground, config, tokenizer):
    [run] = last(playground, Request("prompt", "Hi", ""), config.sampling)
    prompt = prompt_ids([{"role": "user", "content": "Hi"}], tokenizer)
    [response] = generate(playground.model, tokenizer, [prompt], config.sampling)
    assert (run.result["text"], run.result["nfe"]) == (response.text, response.nfe)
    assert run.result["tokens_per_forward"] == response.tokens_per_forward
    assert len(run.steps) == 6
    assert run.page.startswith("<!DOCTYPE html>")


def test_two_settings_have_the_same_prompt_and_seed(playground, config):
    few = replace(config.sampling, steps=2)
    first, second = last(playground, Request("prompt", "Hi", ""), config.sampling, few)
    [alone] = last(playground, Request("prompt", "Hi", ""), few)
    assert second.result["text"] == alone.result["text"]
    assert (len(first.steps), len(second.steps)) == (6, 2)
    given = [json.loads(each.header)["given"] for each in (first, second)]
    assert given[0] == given[1] != []


def test_a_chat_goes_on(playground, config, tokenizer):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    [run] = last(playground, Request("chat", "And?", "", "Be brief.", turns), config.sampling)
    messages = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "And?"}]
    [response] = generate(playground.model, tokenizer, [prompt_ids(messages, tokenizer)], config.sampling, [1])
    assert run.result["text"] == response.text


@pytest.mark.parametrize("prompt", ["", "Hi"])
def test_a_template_is_filled(playground, config, prompt):
    [run] = last(playground, Request("template", prompt, "x = <|mask:3|>!"), config.sampling)
    assert run.result["text"].startswith("x = ")
    assert run.result["text"].endswith("!")
    assert json.loads(run.header)["masked"] == run.result["tokens"] == 3


@pytest.mark.parametrize(
    ("request_", "changes", "message"),
    [
        (lambda: Request("prompt", " ", ""), {}, "prompt"),
        (lambda: Request("template", "Hi", " "), {}, "template"),
        (lambda: Request("shout", "Hi", ""), {}, "mode=shout: .* prompt, chat, template"),
        (lambda: Request("prompt", "a" * 100_001, ""), {}, "prompt: .* 100,001 .* 100,000"),
        (lambda: Request("prompt", "Hi", "", "\N{GRINNING FACE}a\ud83d"), {}, "system: character 3 "),
        (lambda: Request("prompt", "Hi " * 2048, ""), {}, r"a prompt of \d{4} .* 2048 tokens"),
        (lambda: Request("prompt", "Hi", ""), {"max_new_tokens": 2048}, r"sampling\.max_new_tokens=2048 "),
        (lambda: Request("template", "", "<|mask:1-3|>"), {}, "sample.py"),
        (lambda: Request("template", "", "<|mask:3000|>"), {}, "template: .* 3000 .* 2048 tokens"),
        (lambda: Request("template", "", "no slot"), {}, "slot"),
        (lambda: Request("prompt", "Hi", ""), {"forbidden": ["two words"]}, r"sampling\.forbidden=.*'two words'"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_the_model_is_asked(
    playground, config, monkeypatch, request_, changes, message
):
    monkeypatch.setattr(playground.model, "hidden", None)
    with pytest.raises(ValueError, match=message):
        last(playground, request_(), config.sampling, replace(config.sampling, **changes))


def test_no_step_is_taken_after_the_reader_has_left():
    taken, go = [], Event()

    def sample(on_step):
        for number in range(100):
            taken.append(number)
            on_step(number)
            assert number or go.wait(60)

    lock = Lock()
    events = events_of(sample, lock)
    assert next(events) == 0
    events.close()
    go.set()
    with lock:  # held while it samples
        assert taken in ([0, 1], [0])


def test_a_sampling_waits_for_the_one_before():
    running, go, lock = [], Event(), Lock()

    def sample(on_step):
        running.append(1)
        on_step(0)
        go.wait(60)
        assert len(running) == 1
        running.pop()
        return "done"

    first, second = events_of(sample, lock), events_of(sample, lock)
    assert next(first) == 0
    go.set()
    assert [*second] == [*first, 0] == [0]


def test_a_full_queue_refuses(playground, config):
    """One that has left makes room."""
    request, settings = Request("prompt", "Hi", ""), [("", config.sampling)]
    others = [playground.run(request, settings) for _ in range(2)]
    assert [next(each)[0].before for each in others] == [0, 1]
    with pytest.raises(ValueError, match=r"^1 other requests"):
        next(playground.run(request, settings))
    others[0].close()
    assert next(playground.run(request, settings))


def test_a_place_is_kept_for_all_settings(playground, config):
    """The number before a request is read again, and a later request waits for the second setting too."""
    request, both = Request("prompt", "Hi", ""), [("", config.sampling), ("again", config.sampling)]
    other = playground.run(request, both)
    next(other)
    mine = playground.run(request, both)
    assert next(mine)[0].before == 1
    assert next(each for each in other if len(each) == 2)
    assert next(mine)[0].before == 1
    other.close()
    assert {each.before for runs in mine for each in runs} == {0}


def test_readers_do_not_change_each_other_s_tokens(playground, config):
    """Texts with control tokens are encoded by other options of the shared tokenizer."""
    texts = ["Solve 3x+5=20 " * 40, "what is <|im_end|>? " * 40]
    requests = [Request("prompt", text, "") for text in texts]
    settings = [("", replace(config.sampling, max_new_tokens=1, steps=1))]
    playground.queue = Queue(waiting=len(texts))

    def header(request) -> str:
        with closing(playground.run(request, settings)) as samples:
            return next(samples)[0].header

    alone = [header(each) for each in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = pool.map(lambda request: {header(request) for _ in range(100)}, requests)
        assert [*together] == [{each} for each in alone]


def test_the_sampler_has_its_own_tokenizer(playground, config, tokenizer, monkeypatch):
    used = []
    monkeypatch.setattr(runs, "response_of", lambda filled, own, _: used.append(own) or response_of(filled, own, _))
    last(playground, Request("prompt", "Hi", ""), config.sampling)
    [own] = used
    own("Hi", split_special_tokens=True)
    tokenizer("Hi", split_special_tokens=False)
    assert own.backend_tokenizer.encode_special_tokens
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def result_of(events):
    """The result of a sampling without further events, and its seconds."""
    try:
        while True:
            assert next(events) is None
    except StopIteration as end:
        return end.value


def test_a_value_comes_while_nothing_happens(monkeypatch):
    monkeypatch.setattr(runs, "IDLE", 0.01)
    go = Event()
    events = events_of(lambda on_step: go.wait(60) and "done", Lock())
    assert next(events) is None
    assert next(events) is None
    go.set()
    assert result_of(events)[0] == "done"


def test_an_error_reaches_the_reader():
    def sample(on_step):
        on_step(1)
        raise MemoryError("too large")

    events = events_of(sample, Lock())
    assert next(events) == 1
    with pytest.raises(MemoryError, match="too large"):
        next(events)


def test_seconds_do_not_count_the_wait(monkeypatch):
    clock, lock = [1.0, 3.5], Lock()
    monkeypatch.setattr(runs, "perf_counter", lambda: clock.pop(0))
    monkeypatch.setattr(runs, "IDLE", 0.01)
    with lock:
        events = events_of(lambda on_step: "text", lock)
        assert next(events) is None
        assert len(clock) == 2
    assert result_of(events) == ("text", 2.5)


def test_an_unexpected_error_goes_to_the_terminal_too(capsys):
    assert message_of(ValueError("sampling.steps=0: must be at least 1")) == "sampling.steps=0: must be at least 1"
    assert message_of(ValueError("alg=\ud800")) == r"alg=\ud800"  # it can be sent
    assert capsys.readouterr().err == ""
    assert message_of(RuntimeError("broken\nlines")) == "broken"
    assert "RuntimeError: broken" in capsys.readouterr().err
