"""Rows into chats: a prompt of system and user messages, and the response to train on."""

from collections.abc import Sequence
from typing import Any, TypedDict

from data.files import PlacedRow

PROMPT_ROLES = ("system", "user")
THINK, END_THINK = "<think>", "</think>"


class Message(TypedDict):
    role: str
    content: str


class Chat(TypedDict):
    prompt: list[Message]
    response: str


def to_chat(placed: PlacedRow) -> Chat:
    """A training row from either schema.

    S1K: `question`, `answer` with its `<think>…</think>` (further fields such as `source`, `difficulty`,
    `thinking_tokens`, `answer_tokens` are for curation). Chat: `prompt`, a list of system and user messages, and
    `response`.

    Raises:
        ValueError: a field is missing, empty or of the wrong type; the message names place and field.
    """
    row, place = placed
    prompt = to_prompt(placed)
    if "prompt" in row:
        return Chat(prompt=prompt, response=_text(row, "response", place))
    answer = _text(row, "answer", place)
    if not 0 <= answer.find(THINK) < answer.find(END_THINK):
        raise ValueError(f"{place}: field 'answer' has no {THINK}…{END_THINK}")
    return Chat(prompt=prompt, response=answer)


def to_prompt(placed: PlacedRow) -> list[Message]:
    """The prompt of a row of either schema, whether or not it has a response.

    Raises:
        ValueError: a field is missing, empty or of the wrong type; the message names place and field.
    """
    row, place = placed
    if "prompt" in row:
        return _messages(row["prompt"], place)
    return [Message(role="user", content=_text(row, "question", place))]


def final_answer(response: str) -> str:
    """What follows the thinking."""
    return response.rpartition(END_THINK)[2].strip()


def _text(row: dict[str, Any], field: str, place: str) -> str:
    if row.get(field) is None:
        raise ValueError(
            f"{place}: field '{field}' is missing; a row has question and answer, or prompt and response. "
            f"Its fields are: {', '.join(row)}"
        )
    if not isinstance(row[field], str):
        raise ValueError(f"{place}: field '{field}' must be text, this is {type(row[field]).__name__}")
    if not row[field].strip():
        raise ValueError(f"{place}: field '{field}' is empty")
    if not row[field].isascii() and any("\ud800" <= character <= "\udfff" for character in row[field]):
        raise ValueError(f"{place}: field '{field}' is not valid Unicode, it has a lone surrogate")
    return row[field]


def _messages(prompt: Any, place: str) -> list[Message]:
    if not isinstance(prompt, Sequence) or isinstance(prompt, str) or not prompt:
        raise ValueError(f"{place}: field 'prompt' must be a non-empty list of messages")
    for message in prompt:
        if not isinstance(message, dict) or message.get("role") not in PROMPT_ROLES:
            raise ValueError(
                f"{place}: each message of 'prompt' is an object with a role, {' or '.join(PROMPT_ROLES)}, and content"
            )
        _text(message, "content", place)
    return [Message(role=message["role"], content=message["content"]) for message in prompt]
