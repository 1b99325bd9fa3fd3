"""The API of OpenAI: its endpoints, its errors, and how the body of a request is read."""

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data.chat import Message
from data.errors import nearest
from sampling import SamplingConfig

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_TEXTS = 16  # of `stop` and `forbidden`
MOST_CHARACTERS = 1000  # of a text in an error
LENGTHS = ("max_tokens", "max_completion_tokens", "max_new_tokens")
SETTINGS = {item.name: item for item in fields(SamplingConfig)}
CONFIG = TypeAdapter(SamplingConfig)
OF_THE_SERVER = ("batch_size", "compile")
IN_BOTH = ("temperature", "top_p", "seed", "stop")  # null means the server's setting, as in the API
OWN = [*dict.fromkeys(("model", "stream", "stream_options", "drafts", *LENGTHS, *SETTINGS))]
# Fields that do not change an answer.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# Fields that are refused unless they have one of these values, with which they change nothing.
NEUTRAL = {"n": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},)}
NEUTRAL_IN_CHATS = NEUTRAL | {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
NEUTRAL_IN_COMPLETIONS = NEUTRAL | {"best_of": (1,), "echo": (False,), "logprobs": (), "suffix": ("",)}
NEUTRAL_IN_MESSAGES = {
    name: ([],) for name in ("name", "tool_calls", "function_call", "tool_call_id", "audio", "refusal", "annotations")
}


class ApiError(Exception):
    """An error for the client.

    Args:
        status: of HTTP.
        param: the field of the body.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        message, param = shortened(message), param and shortened(param)
        super().__init__(message)
        self.param = param
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def shortened(text: str) -> str:
    """A text, without its middle if it is long: an error begins with the client's field and ends with the rule."""
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"


@dataclass(frozen=True)
class Endpoint:
    """One of the two ways to ask."""

    id: str  # begins the ids of responses
    object: str
    chunk: str  # `object` of the parts of a stream
    prompt: str  # field of the body
    neutral: Mapping[str, Sequence[Any]]


CHAT = Endpoint("chatcmpl", "chat.completion", "chat.completion.chunk", "messages", NEUTRAL_IN_CHATS)
TEXT = Endpoint("cmpl", "text_completion", "text_completion", "prompt", NEUTRAL_IN_COMPLETIONS)


@dataclass(frozen=True)
class Query:
    """A checked body."""

    prompt: list[Message] | str | list[int]  # messages, raw text, or token ids
    config: SamplingConfig
    length: str  # field that gave `config.max_new_tokens`
    stream: bool
    usage: bool  # in a stream
    drafts: bool


def parse_body(content: bytes | bytearray) -> dict[str, Any]:
    """The object in a body.

    Raises:
        ApiError: it is not one in JSON.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        body = json.loads(content, parse_constant=refuse)
        json.dumps(body, ensure_ascii=False).encode()  # refuses lone surrogates
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be an object, not {type(body).__name__}")
    return body


def read_query(body: Mapping[str, Any], endpoint: Endpoint, model: str, server: SamplingConfig) -> Query:
    """Check a body.

    Args:
        model: name of the served model.
        server: settings of the server, for fields that the body lacks.

    Raises:
        ApiError: a field is unknown, not supported or wrong.
    """
    known = [endpoint.prompt, *OWN, *endpoint.neutral, *IGNORED]
    for name in body:
        if name not in known:
            raise ApiError(400, f"{name}: no such field; {nearest(name, known)}", name, "unknown_field")
    _refuse_meaningful(body, endpoint.neutral)
    if _typed(body, "model", str, model) != model:
        raise ApiError(404, f"model={body['model']}: this server has {model}", "model", "model_not_found")
    stream = _typed(body, "stream", bool, False)
    options = _typed(body, "stream_options", dict, {})
    drafts = _typed(body, "drafts", bool, False)
    if drafts and not stream:
        raise ApiError(400, "drafts=true: goes with stream=true", "drafts")
    prompt = read_messages(body.get("messages")) if endpoint is CHAT else read_text(body.get("prompt"))
    length = next((name for name in LENGTHS if body.get(name) is not None), "max_tokens")
    config, usage = read_settings(body, length, server), _typed(options, "include_usage", bool, False)
    return Query(prompt, config, length, stream, usage, drafts)


def _refuse_meaningful(holder: Mapping[str, Any], neutral: Mapping[str, Sequence[Any]], where: str = "") -> None:
    for name, values in neutral.items():
        value = holder.get(name)
        is_neutral = any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)
        if value is not None and not is_neutral:
            raise ApiError(400, f"{where}{name}: not supported; leave it out", f"{where}{name}", "unsupported_field")


def _typed(holder: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = holder.get(name)
    if value is not None and not isinstance(value, kind):
        raise ApiError(400, f"{name}: must be {kind.__name__}, not {type(value).__name__}", name)
    return default if value is None else value


def read_messages(messages: Any) -> list[Message]:
    """Messages of a chat.

    Raises:
        ApiError: they are missing, have something else than text, or end with an empty one.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages: must be a list of at least one message", "messages")
    read = [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    if not read[-1]["content"].strip():
        raise ApiError(400, "messages: the last one is empty", "messages")
    return read


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ApiError(400, f"{where}: must be an object with role and content", where)
    known = ("role", "content", *NEUTRAL_IN_MESSAGES)
    for name in message:
        if name not in known:
            raise ApiError(
                400, f"{where}.{name}: no such field; {nearest(name, known)}", f"{where}.{name}", "unknown_field"
            )
    _refuse_meaningful(message, NEUTRAL_IN_MESSAGES, f"{where}.")
    if message.get("role") not in [*ROLES]:
        raise ApiError(400, f"{where}.role: must be one of {', '.join(ROLES)}", f"{where}.role")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ApiError(400, f"{where}.content: must be text, or a list of parts", f"{where}.content")
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(400, f"{where}.content: only parts of type text are supported", f"{where}.content")
    return Message(role=ROLES[message["role"]], content="".join(part["text"] for part in parts))


def read_text(prompt: Any) -> str | list[int]:
    """The one prompt of a completion: a text or token ids, alone or in a list.

    Raises:
        ApiError: there is another number of prompts, or the prompt is empty.
    """
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        [prompt] = prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    if not isinstance(prompt, str):
        raise ApiError(400, "prompt: must be one text, or one list of token ids; send several as requests", "prompt")
    if not prompt:
        raise ApiError(400, "prompt: it is empty", "prompt")
    return prompt


def read_settings(body: Mapping[str, Any], length: str, server: SamplingConfig) -> SamplingConfig:
    """Sampling settings of a request.

    Args:
        length: the body's name for `max_new_tokens`.

    Raises:
        ApiError: one is wrong, or belongs to the server.
    """
    changes = {name: body[name] for name in SETTINGS if name in body and not (name in IN_BOTH and body[name] is None)}
    lengths = {name: body[name] for name in LENGTHS if body.get(name) is not None}
    if len({*map(repr, lengths.values())}) > 1:
        raise ApiError(400, f"{' and '.join(lengths)} differ: give one of them", length)
    changes["max_new_tokens"] = lengths.get(length, server.max_new_tokens)
    if isinstance(changes.get("stop"), str):
        changes["stop"] = [changes["stop"]]
    for name in ("stop", "forbidden"):
        if isinstance(texts := changes.get(name), list) and len(texts) > MOST_TEXTS:
            raise ApiError(400, f"{name}: {len(texts)} texts, at most {MOST_TEXTS} can be", name)
    for name in OF_THE_SERVER:
        if name in changes and changes[name] != getattr(server, name):
            raise ApiError(400, f"{name}: is decided when the server starts, as sampling.{name}=…", name)
    return _checked(asdict(server) | changes, length)


def _checked(settings: dict[str, Any], length: str) -> SamplingConfig:
    """Settings of the right types and ranges.

    Args:
        length: the body's name for `max_new_tokens`.

    Raises:
        ApiError: naming the field of the body.
    """
    try:
        return CONFIG.validate_json(json.dumps(settings), strict=True)
    except ValidationError as errors:
        error = errors.errors()[0]
    if not error["loc"]:  # of the dataclass itself
        raise setting_error(error["ctx"]["error"], length)
    name = str(error["loc"][0])
    value, name = reprlib.repr(settings[name]), length if name == "max_new_tokens" else name
    raise ApiError(400, f"{name}={value}: {error['msg']}", name)


def setting_error(error: ValueError, length: str) -> ApiError:
    """An error about a sampling setting as one about a field of the body.

    Args:
        length: the body's name for `max_new_tokens`.
    """
    message = str(error).replace("sampling.max_new_tokens", length).replace("sampling.", "")
    name = re.match(r"\w*", message)[0]
    return ApiError(400, message, name if name in (length, *SETTINGS) else None)
