"""How rows of published sets become training rows."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data.chat import END_THINK, THINK, to_chat
from data.readers import PlacedRow, listed

Row = dict[str, Any]

OTHER_FORMS = ("messages", "prompt")  # of the same row, which would be taken before the one that is made
# Attempts of two models in s1K-1.1, of which one is taken.
S1K_ATTEMPTS = [f"{model}_{part}" for model in ("deepseek", "gemini") for part in ("thinking_trajectory", "attempt")]
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class RawSet:
    """A kind of set.

    Attributes:
        convert: a training row from a raw one; raises KeyError, TypeError or ValueError where that cannot be.
        hub_id: where it is published, if it is one set.
    """

    convert: Callable[[Row], Row]
    hub_id: str | None = None


def with_thinking(thinking: str, answer: str) -> str:
    """An answer behind the thinking that led to it, as S1K writes them.

    Raises:
        ValueError: there is no answer.
    """
    if not answer.strip():
        raise ValueError("there is no answer behind the thinking")
    return "\n".join(filter(None, [THINK, thinking.strip(), END_THINK, answer.strip()]))


def from_s1k(row: Row) -> Row:
    """s1K (arXiv 2501.19393), s1K-1.1 with its separate columns, or rows that have their `<think>` already."""
    if THINK in (row.get("answer") or ""):
        return row
    if "deepseek_thinking_trajectory" in row:
        thoughts, answer = [row["deepseek_thinking_trajectory"]], row["deepseek_attempt"]
    else:
        thoughts, answer = row["thinking_trajectories"], row["attempt"]
    if len(thoughts) != 1 or not thoughts[0].strip():
        raise ValueError(f"the thinking is empty, or more than one text ({len(thoughts)})")
    return {
        "question": row["question"],
        "answer": with_thinking(thoughts[0], answer),
        "source": row.get("source_type"),
        "subject": row.get("cot_type"),
        **_others(row, "question", "answer", "attempt", "cot", "thinking_trajectories", *S1K_ATTEMPTS, *OTHER_FORMS),
    }


def from_gsm8k(row: Row) -> Row:
    """GSM8K (arXiv 2110.14168): the worked answer is the thinking, without the calculator's marks."""
    thinking, found, answer = row["answer"].rpartition("####")
    if not found:
        raise ValueError("field 'answer' has no #### before the final answer")
    thinking = re.sub(r"<<.*?>>", "", thinking).strip()
    return {
        "question": row["question"],
        "answer": with_thinking(thinking, answer),
        "source": "gsm8k",
        "difficulty": len(thinking.splitlines()),  # steps
    }


def from_alpaca(row: Row) -> Row:
    """An instruction, with an input behind it if there is one, and an output; `system` and `history` come before."""
    for name in ("instruction", "output"):
        if not row[name].strip():
            raise ValueError(f"field '{name}' is empty")
    question = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text)
    turns = [turn for asked, answered in row.get("history") or [] for turn in (_user(asked), _assistant(answered))]
    others = _others(row, "instruction", "input", "output", "system", "history", *OTHER_FORMS)
    return {**others, "prompt": [*_system(row), *turns, _user(question)], "response": row["output"]}


def from_messages(row: Row) -> Row:
    """Chats, whose further fields (of Tulu: id and source) are kept; ShareGPT's names are translated.

    A text in `system` comes before them.
    """
    field = "messages" if row.get("conversations") is None else "conversations"
    turns = row[field]
    if not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"field '{field}' must be a non-empty list of messages")
    if any("from" in turn for turn in turns):
        if unknown := sorted({repr(turn["from"]) for turn in turns if turn["from"] not in SHAREGPT_ROLES}):
            raise ValueError(f"a turn is from {', '.join(unknown)}, expected {', '.join(SHAREGPT_ROLES)}")
        turns = [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    if turns[0].get("role") != "system":
        turns = [*_system(row), *turns]
    return {**_others(row, "conversations", "system"), "messages": turns}


def from_prompt_response(row: Row) -> Row:
    """Rows as Dream's published trainer takes them: the prompt a text or messages, and a response."""
    return {**_others(row, *OTHER_FORMS), "prompt": row["prompt"], "response": row["response"]}


def _others(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _user(text: str) -> Row:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def _system(row: Row) -> list[Row]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


RAW_SETS = {
    "s1k": RawSet(from_s1k, "simplescaling/s1K"),
    "gsm8k": RawSet(from_gsm8k, "openai/gsm8k/main"),
    "alpaca": RawSet(from_alpaca),
    "messages": RawSet(from_messages),
    "sharegpt": RawSet(from_messages),
    "prompt_response": RawSet(from_prompt_response),
}


def convert(placed: PlacedRow, raw_set: RawSet) -> Row:
    """A training row that `to_chat` takes.

    Raises:
        ValueError: a field is missing or not what the set says; the message names the place.
    """
    row, place = placed
    try:
        made = raw_set.convert(row)
    except KeyError as error:
        raise ValueError(f"{place}: field {error} is missing; its fields are: {listed(list(row))}") from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
    to_chat(PlacedRow(made, place))
    return made
