"""Counts of the server, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from diffllm.generate import Response
from launch.serve.engine import Engine

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
SPEEDS = (1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)


class Metrics:
    """Counters of one server. Tokens and forwards are those of complete responses."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("diffllm_requests", "Requests, by HTTP status; 499: the client left", ["status"], **own)
        self.prompt_tokens = Counter("diffllm_prompt_tokens", "Tokens of prompts", **own)
        self.tokens = Counter("diffllm_tokens", "Tokens of responses", **own)
        self.forwards = Counter("diffllm_forwards", "Forwards of the model (NFE), counted for each row", **own)
        self.seconds = Histogram("diffllm_request_seconds", "Seconds of an answered request", buckets=SECONDS, **own)
        self.speed = Histogram("diffllm_tokens_per_second", "Tokens a second of a response", buckets=SPEEDS, **own)
        for name, meaning, value in (
            ("diffllm_queue_length", "Requests that wait for a place in the batch", lambda: engine.waiting),
            ("diffllm_running_rows", "Canvases that are being filled", lambda: engine.running),
        ):
            Gauge(name, meaning, **own).set_function(value)

    def answered(self, prompt_tokens: int, response: Response, seconds: float) -> None:
        """Count a complete response."""
        self.prompt_tokens.inc(prompt_tokens)
        self.tokens.inc(response.tokens)
        self.forwards.inc(response.nfe)
        self.seconds.observe(seconds)
        self.speed.observe(response.tokens / seconds)

    def text(self) -> bytes:
        """All of them, in the text format of Prometheus."""
        return generate_latest(self.registry)
