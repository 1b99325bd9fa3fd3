"""Rows into chats: the messages before an answer, and the answer to train on."""

import reprlib
from collections.abc import Sequence
from typing import Any, TypedDict

from data.readers import PlacedRow, listed

THINK, END_THINK = "<think>", "</think>"
# A row is of the first schema whose field it has; the second field is the answer.
SCHEMAS = {"messages": "messages", "prompt": "response", "question": "answer"}
CONVERTED = {"instruction": "alpaca", "conversations": "sharegpt"}  # by data.prepare, rows with such a field
MAX_TEXT = 2**20  # characters of one text: it is tokenized at once
NOT_TEXT = ("tool_calls", "function_call", "images", "videos", "audio")  # what messages hold beside their content


class Message(TypedDict):
    role: str
    content: str


class Chat(TypedDict):
    prompt: list[Message]
    response: str


def to_chat(placed: PlacedRow) -> Chat:
    """A training row from any of the schemas.

    S1K: `question`, `answer` with its `<think>…</think>` (further fields such as `source`, `difficulty`,
    `thinking_tokens`, `answer_tokens` are for curation). Prompt and response: `prompt`, a text or the messages before
    the answer, and `response`. Messages: `messages`, of which the last is the assistant's.

    Raises:
        ValueError: a field is missing, empty or of the wrong type, or roles are out of order; the message names place
            and field.
    """
    row, place = placed
    schema = schema_of(row)
    if schema == "messages":
        *prompt, last = _messages(row["messages"], "messages", "assistant", place)
        return Chat(prompt=prompt, response=last["content"])
    prompt, response = to_prompt(placed), _text(row, SCHEMAS[schema], place)
    _check_thinking(response, f"{place}: field '{SCHEMAS[schema]}'", needed=schema == "question")
    return Chat(prompt=prompt, response=response)


def to_prompt(placed: PlacedRow) -> list[Message]:
    """The messages before the answer of a row of any schema, whether or not it has one.

    Raises:
        ValueError: as `to_chat`.
    """
    row, place = placed
    match schema_of(row):
        case "messages":
            messages = row["messages"]
            answered = isinstance(messages, list) and messages and _role(messages[-1]) == "assistant"
            return (
                _messages(messages, "messages", "assistant", place)[:-1]
                if answered
                else _messages(messages, "messages", "user", place)
            )
        case "prompt" if isinstance(row.get("prompt"), str | None):
            return [Message(role="user", content=_text(row, "prompt", place))]
        case "prompt":
            return _messages(row["prompt"], "prompt", "user", place)
        case _:
            return [Message(role="user", content=_text(row, "question", place))]


def schema_of(row: dict[str, Any]) -> str:
    """The field that says how a row is to be read; where there is none, that of the answer it has, or `question`."""
    asked = (field for field in SCHEMAS if row.get(field) is not None)
    answered = (field for field, answer in SCHEMAS.items() if row.get(answer) is not None)
    return next(asked, None) or next(answered, "question")


def final_answer(response: str) -> str:
    """What follows the thinking."""
    return response.rpartition(END_THINK)[2].strip()


def _text(row: dict[str, Any], field: str, place: str) -> str:
    if row.get(field) is None:
        kinds = [CONVERTED[name] for name in row if name in CONVERTED]
        advice = f"; `python -m data.prepare {kinds[0]}` converts such rows" if kinds else ""
        found = "null" if field in row else "missing"
        raise ValueError(
            f"{place}: field '{field}' is {found}; a row has question and answer, prompt and response, or messages. "
            f"Its fields are: {listed(list(row))}{advice}"
        )
    if not isinstance(row[field], str):
        raise ValueError(f"{place}: field '{field}' must be text, this is {type(row[field]).__name__}")
    return _well_formed(row[field], f"{place}: field '{field}'")


def _check_thinking(answer: str, what: str, needed: bool = False) -> None:
    """Refuse thinking that is begun and never ended; if it is `needed`, also an answer without it, or nothing else."""
    begun, ended = answer.lstrip().startswith(THINK), END_THINK in answer
    if needed and not (begun and ended):
        advice = (
            "`python -m data.prepare gsm8k` converts rows of GSM8K"
            if "####" in answer
            else "where there is no thinking, call the fields `prompt` and `response`"
        )
        raise ValueError(f"{what} does not begin with {THINK}…{END_THINK}; {advice}")
    if begun and not ended:
        raise ValueError(f"{what} begins with {THINK} and has no {END_THINK}")
    if needed and not final_answer(answer):
        raise ValueError(f"{what} has no answer behind {END_THINK}")


def _well_formed(text: str, what: str) -> str:
    if not text.strip():
        raise ValueError(f"{what} is empty")
    if len(text) > MAX_TEXT:
        raise ValueError(f"{what} has {len(text):,} characters, more than {MAX_TEXT:,}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{what} is not valid Unicode, it has a lone surrogate")
    return text


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _messages(messages: Any, field: str, last: str, place: str) -> list[Message]:
    """Messages in which a system message may come first, then user and assistant in turn, up to one of `last`."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{place}: field '{field}' must be a non-empty list of messages")
    expected = "user"
    for number, message in enumerate(messages, start=1):
        role = _role(message)
        if role == expected:
            expected = "assistant" if role == "user" else "user"
        elif role != "system" or number > 1:
            converted = " (`python -m data.prepare sharegpt` converts ShareGPT's)" if role in (None, "human") else ""
            raise ValueError(
                f"{place}: message {number} of '{field}' has role {reprlib.repr(role)}, expected {expected!r}: a "
                "system message may come first, then user and assistant in turn, each an object with role and "
                f"content{converted}"
            )
        if more := [name for name in NOT_TEXT if message.get(name)]:
            raise ValueError(f"{place}: message {number} of '{field}' has {listed(more)}: only text is trained on")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{place}: message {number} of '{field}' has no text as its content")
        content = _well_formed(message["content"], what := f"{place}: message {number} of '{field}'")
        if role == "assistant":
            _check_thinking(content, what)
    if _role(messages[-1]) != last:
        raise ValueError(f"{place}: the last of '{field}' must be the {last}'s, it is the {_role(messages[-1])}'s")
    return [Message(role=message["role"], content=message["content"]) for message in messages]
