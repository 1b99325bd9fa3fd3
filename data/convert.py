"""Convert rows of published sets to training rows."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data.chat import COMPLETION, SYSTEM, THINK, is_given, kind_of, system_of, to_chat, unused, with_thinking
from data.errors import listed
from data.readers import PlacedRow

Row = dict[str, Any]

OTHER_FORMS = ("messages", "prompt")  # fields that `to_chat` would prefer to the converted ones
# s1K-1.1 has attempts of two models; one is used.
S1K_ATTEMPTS = [f"{model}_{part}" for model in ("deepseek", "gemini") for part in ("thinking_trajectory", "attempt")]
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class RawSet:
    """A format of raw rows.

    Attributes:
        convert: makes a training row from a raw one; raises KeyError, TypeError or ValueError for a wrong row.
        hub_id: of the format's only set, if any.
    """

    convert: Callable[[Row], Row]
    hub_id: str | None = None


def from_s1k(row: Row) -> Row:
    """Convert s1K (arXiv 2501.19393), s1K-1.1 with its separate columns, or rows that have `<think>` already."""
    if THINK in (_optional(row, "answer") or ""):
        return _others(row, *OTHER_FORMS)
    if "deepseek_thinking_trajectory" in row:
        thinking, name = _text(row, "deepseek_thinking_trajectory"), "deepseek_attempt"
    else:
        thinking, name = _only(row, "thinking_trajectories"), "attempt"
    answer = _text(row, name)
    _either(row, name, "answer")
    if not thinking.strip():
        raise ValueError("the thinking is empty")
    return {
        "question": _text(row, "question"),
        "answer": with_thinking(thinking, answer.rstrip()),
        "source": row.get("source_type"),
        "subject": row.get("cot_type"),
        **_others(row, "question", "answer", "attempt", "cot", "thinking_trajectories", *S1K_ATTEMPTS, *OTHER_FORMS),
    }


def from_gsm8k(row: Row) -> Row:
    """Convert GSM8K (arXiv 2110.14168): the worked answer becomes the thinking, without the calculator's marks."""
    thinking, found, answer = _text(row, "answer").rpartition("####")
    if not found:
        raise ValueError("field 'answer' has no #### before the final answer")
    thinking = "\n".join(map(_without_marks, thinking.split("\n"))).strip()
    return {
        **_others(row, *OTHER_FORMS),
        "question": _text(row, "question"),
        "answer": with_thinking(thinking, answer.strip()),
        "source": row["source"] if is_given(row.get("source")) else "gsm8k",
        "difficulty": row["difficulty"] if is_given(row.get("difficulty")) else len(thinking.splitlines()),  # steps
    }


def _without_marks(line: str) -> str:
    # No mark ends after the last >>. A search for one from each << would take quadratic time.
    marked, end, rest = line.rpartition(">>")
    return re.sub("<<.*?>>", "", marked + end) + rest


def from_alpaca(row: Row) -> Row:
    """Convert instruction, optional input and output; `system` and `history` come before.

    Dolly names the input `context` and the output `response`.
    """
    output = _either(row, "output", "response")
    for name in ("instruction", output):
        if not _text(row, name).strip():
            raise ValueError(f"field '{name}' is empty")
    more = _optional(row, _either(row, "input", "context"))
    question = "\n\n".join(filter(None, [row["instruction"], more]))
    turns = [_turn(role, text) for pair in _pairs(row) for role, text in zip(("user", "assistant"), pair, strict=True)]
    used = ("instruction", "input", "context", "output", "response", "history")
    prompt = [*_system(row), *turns, _turn("user", question)]
    return {**_others(row, *used, *SYSTEM, *OTHER_FORMS), "prompt": prompt, "response": row[output]}


def from_messages(row: Row) -> Row:
    """Convert chats, with ShareGPT's names translated and further fields kept. A text in `system` comes first."""
    names = ("messages", "conversations") if row.get("conversations") is None else ("conversations", "messages")
    field = _either(row, *names)
    turns = row[field]
    if not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"field '{field}' must be a non-empty list of messages")
    if any("from" in turn for turn in turns):
        turns = [_from_sharegpt(turn, number) for number, turn in enumerate(turns, start=1)]
        if unknown := sorted({repr(turn["role"]) for turn in turns} - set(map(repr, SHAREGPT_ROLES))):
            raise ValueError(f"a turn is from {', '.join(unknown)}, expected {', '.join(SHAREGPT_ROLES)}")
        turns = [turn | {"role": SHAREGPT_ROLES[turn["role"]]} for turn in turns]
    others = _others(row, "conversations")
    if turns[0].get("role") != "system":
        turns, others = [*_system(row), *turns], _others(others, *SYSTEM)
    return {**others, "messages": turns}


def from_prompt_response(row: Row) -> Row:
    """Convert rows of Dream's published trainer: a prompt, as text or messages, and a response."""
    answer = _either(row, "response", COMPLETION)
    for name in ("prompt", answer):
        if not isinstance(row[name], list):
            _text(row, name)
    return {**_others(row, *OTHER_FORMS), "prompt": row["prompt"]}


def _from_sharegpt(turn: Row, number: int) -> Row:
    """A turn with the field names of messages; further fields are kept."""
    try:
        content = turn["value"] if isinstance(turn["value"], list) else _text(turn, "value")
        return {**_others(turn, "from", "value"), "role": _text(turn, "from"), "content": content}
    except KeyError as error:
        raise ValueError(f"turn {number}: field {error} is missing") from error
    except ValueError as error:
        raise ValueError(f"turn {number}: {error}") from error


def _others(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _turn(role: str, text: str) -> Row:
    return {"role": role, "content": text}


def _system(row: Row) -> list[Row]:
    text = system_of(row)
    return [] if text is None else [_turn("system", text)]


def _text(row: Row, name: str) -> str:
    """A field that must be text.

    Raises:
        KeyError: the field is missing.
        ValueError: the field has another type.
    """
    if not isinstance(row[name], str):
        raise ValueError(f"field '{name}' must be text, not {kind_of(row[name])}")
    return row[name]


def _optional(row: Row, name: str) -> str | None:
    """A field that is text, or missing."""
    return None if row.get(name) is None else _text(row, name)


def _only(row: Row, name: str) -> str:
    """The only text of a list."""
    texts = row[name]
    if not isinstance(texts, list):
        raise ValueError(f"field '{name}' must be a list of one text, not {kind_of(texts)}")
    if len(texts) != 1:
        raise ValueError(f"the thinking is empty, or more than one text ({len(texts)})")
    return _text({name: texts[0]}, name)


def _pairs(row: Row) -> list[list[str]]:
    """Earlier questions and answers, in pairs."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("field 'history' must be a list of pairs of text")
    return [[_text({"history": text}, "history") for text in pair] for pair in pairs]


def _either(row: Row, name: str, other: str) -> str:
    """The name, of two for one field, that a row has.

    Raises:
        ValueError: the row has both, with different values.
    """
    if is_given(row.get(name)) and is_given(row.get(other)) and row[name] != row[other]:
        raise ValueError(f"fields '{name}' and '{other}' differ: keep one of them")
    return other if is_given(row.get(other)) and not is_given(row.get(name)) else name


RAW_SETS = {
    "s1k": RawSet(from_s1k, "simplescaling/s1K"),
    "gsm8k": RawSet(from_gsm8k, "openai/gsm8k/main"),
    "alpaca": RawSet(from_alpaca),
    "messages": RawSet(from_messages),
    "sharegpt": RawSet(from_messages),
    "prompt_response": RawSet(from_prompt_response),
}


class _ReadRow(dict):
    """A row that remembers which of its fields were read."""

    def __init__(self, row: Row):
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def convert(placed: PlacedRow, raw_set: RawSet, add_unused: Callable[[Iterable[str]], None] | None = None) -> Row:
    """Convert a row, and check that `to_chat` accepts the result.

    Args:
        add_unused: takes the names of columns with values that were neither read nor kept for training.

    Raises:
        ValueError: a field is missing or wrong; the message names the place.
    """
    row, place = _ReadRow(placed.row), placed.place
    try:
        made = raw_set.convert(row)
    except KeyError as error:
        raise ValueError(f"{place}: field {error} is missing; its fields are: {listed(list(row))}") from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
    to_chat(PlacedRow(made, place))
    if add_unused:
        ignored = unused(made)
        unread = {name: value for name, value in placed.row.items() if is_given(value) and name not in row.read}
        of_row = [name for name, value in unread.items() if made.get(name) != value or name in ignored]
        add_unused([*of_row, *(name for name in ignored if "[]." in name)])
    return made
