"""The API of OpenAI: a response, in one piece or as the parts of a stream."""

import time
import uuid
from typing import Any

from diffllm.generate import Response
from launch.serve.protocol import CHAT, TEXT, Endpoint, Query


class Reply:
    """Bodies of the response to a query."""

    def __init__(self, endpoint: Endpoint, model: str, query: Query, prompt_tokens: int):
        self.endpoint, self.query, self.prompt_tokens = endpoint, query, prompt_tokens
        self.head = {"id": f"{endpoint.id}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, response: Response) -> dict[str, Any]:
        """The response in one piece."""
        text = response.text
        own = {"text": text} if self.endpoint is TEXT else {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, **own, "logprobs": None, "finish_reason": finish_reason(response)}
        return {
            **self.head,
            "object": self.endpoint.object,
            "choices": [choice],
            "usage": self._usage(response),
            **_cost(response),
        }

    def first(self) -> dict[str, Any] | None:
        """The first part of a stream, which names the role."""
        return self._part({"role": "assistant", "content": ""}, None) if self.endpoint is CHAT else None

    def part(self, text: str, draft: dict[str, Any] | None) -> dict[str, Any]:
        """A part of a stream: text that is final, and the whole draft if the client asked for it."""
        return self._part({"content": text} if text else {}, None) | ({} if draft is None else {"draft": draft})

    def last(self, rest: str, response: Response) -> list[dict[str, Any]]:
        """The last parts of a stream: the rest of the text, the reason of its end, the usage."""
        parts = [self.part(rest, None)] if rest else []
        parts.append(self._part({}, finish_reason(response)) | _cost(response))
        if self.query.usage:
            parts.append({**parts[-1], "choices": [], "usage": self._usage(response)})
        return parts

    def _part(self, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        own = {"text": delta.get("content", "")} if self.endpoint is TEXT else {"delta": delta}
        choice = {"index": 0, **own, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.query.usage else {}
        return {**self.head, "object": self.endpoint.chunk, "choices": [choice], **usage}

    def _usage(self, response: Response) -> dict[str, int]:
        prompt, new = self.prompt_tokens, response.tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def finish_reason(response: Response) -> str:
    """Return `finish_reason` of the API."""
    return "stop" if response.ended else "length"


def _cost(response: Response) -> dict[str, float]:
    return {"nfe": response.nfe, "tokens_per_forward": response.tokens_per_forward}
