"""A server in a thread of the tests, and its client."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
import openai

from data import prompt_ids
from diffllm import DiffLLM, new_model
from diffllm.generate import Response, generate
from diffllm.tokenizer import builtin_tokenizer
from launch.serve.config import ServeConfig
from launch.serve.server import Server, bind
from launch.serve.service import Service
from sampling import SamplingConfig
from tests.conftest import small_shape

SMALL = SamplingConfig(max_new_tokens=8, batch_size=8)
ASK = [{"role": "user", "content": "Solve 3x+5=20"}]
NAME = "small"


def sure_model() -> DiffLLM:
    """A small model whose logits differ by more than rounding."""
    return new_model(small_shape(initializer_range=0.4), builtin_tokenizer()).eval()


class Gate:
    """Lets a model forward, or holds it."""

    def __init__(self, model: DiffLLM):
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()
        hidden = model.hidden

        def gated(*arguments):
            self.reached.set()
            assert self.open.wait(60)
            return hidden(*arguments)

        model.hidden = gated

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Hold the model at its next forward, until the end of the block."""
        self.reached.clear()
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()


@dataclass
class Served:
    """A running server."""

    service: Service
    server: Server
    model: DiffLLM
    gate: Gate
    url: str
    client: openai.OpenAI
    http: httpx2.Client

    def post(self, body: dict | bytes, path: str = "/v1/chat/completions") -> httpx2.Response:
        return self.http.post(path, **({"content": body} if isinstance(body, bytes) else {"json": body}))

    def metric(self, name: str) -> float:
        lines = (line.rpartition(" ") for line in self.http.get("/metrics").text.splitlines())
        return next((float(value) for key, _, value in lines if key == name), 0.0)

    def alone(self, prompt: list[dict] | str, config: SamplingConfig) -> Response:
        """What sample.py answers with these settings."""
        tokenizer = builtin_tokenizer()
        if isinstance(prompt, str):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        else:
            ids = prompt_ids(prompt, tokenizer)
        return next(generate(self.model, tokenizer, [ids], config, [0]))


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def serving(sampling: SamplingConfig = SMALL, chats: bool = True, **limits) -> Iterator[Served]:
    """A server of `sure_model` in a thread, until the end of the block.

    Args:
        chats: with a chat template.
    """
    model, tokenizer = sure_model(), builtin_tokenizer()
    if not chats:
        tokenizer.chat_template = None
    service = Service(NAME, model, tokenizer, sampling, ServeConfig(port=0, **limits))
    server, gate = Server(service), Gate(model)
    with bind("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        service.engine.start()
        thread.start()
        until(lambda: server.started)
        with (
            httpx2.Client(base_url=url, timeout=60) as http,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
        ):
            try:
                yield Served(service, server, model, gate, url, client, http)
            finally:
                gate.open.set()
                server.should_exit = True
                thread.join(60)
                service.close()
    assert not thread.is_alive()
