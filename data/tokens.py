"""Chats into token rows through the tokenizer's chat template."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from hashlib import sha1
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from data.chat import END_THINK, THINK, Chat, Message

DAY = datetime(2026, 1, 1)
# In front of templates that write the date: so a row is the same on every day.
ONE_DAY = "".join(
    [
        "{% macro strftime_now(format) %}{{ format",
        *(f" | replace('%{code}', '{DAY.strftime(f'%{code}')}')" for code in (*"aAbBdHIjmMpSyY", "-d")),
        " }}{% endmacro %}",
    ]
)
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "prompt_length": pa.int32(),
        "context": pa.list_(pa.int32()),
        "thinking_tokens": pa.int32(),
        "answer_tokens": pa.int32(),
        "cut": pa.int32(),
        "source": pa.int32(),
        "difficulty": pa.float64(),
        "place": pa.string(),
    }
)


class Encoded(NamedTuple):
    """A chat in tokens."""

    input_ids: list[int]  # prompt, then response with the end-of-sequence token
    prompt_length: int
    context: list[int]  # start, end, start, end, … of what in the response is not trained on: later questions
    thinking_tokens: int  # of the last answer, without its tags; 0 where there are none
    answer_tokens: int  # of the last answer, after its thinking, without the end-of-sequence token
    thinking_end: int  # where the thinking ends

    def until(self, length: int) -> "Encoded":
        """What its first `length` tokens hold."""
        thinking_lost, answer_lost = (max(0, end - length) for end in (self.thinking_end, len(self.input_ids) - 1))
        return self._replace(
            input_ids=self.input_ids[:length],
            thinking_tokens=max(0, self.thinking_tokens - thinking_lost),
            answer_tokens=max(0, self.answer_tokens - answer_lost),
        )


class TokenRows:
    """Prompts followed by their responses; a response ends with the end-of-sequence token, unless it was cut.

    Args:
        table: of SCHEMA, in memory or mapped from a file: of its tokens only what is asked for is read.
        chosen: rows of the table, in order; all by default.
    """

    def __init__(self, table: pa.Table, chosen: np.ndarray | None = None):
        self.table = table
        self.chosen = range(len(table)) if chosen is None else chosen  # an array of all would grow with them
        self._starts = np.cumsum([0, *map(len, table["input_ids"].chunks)])
        self._chunks = {name: [_numpy(chunk) for chunk in table[name].chunks] for name in ("input_ids", "context")}

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], prompt_lengths: Sequence[int], cut: bool = False) -> "TokenRows":
        """Rows given as token arrays, whole or all cut."""
        encoded = [
            {"input_ids": ids, "prompt_length": length, "cut": int(cut)}
            for ids, length in zip(rows, prompt_lengths, strict=True)
        ]
        return cls(pa.Table.from_pylist(encoded, SCHEMA))

    def __len__(self) -> int:
        return len(self.chosen)

    def select(self, rows: np.ndarray) -> "TokenRows":
        """Some of the rows, in the order given."""
        return TokenRows(self.table, self._of_chosen(np.arange(len(self.table)))[rows])

    def ids(self, row: int) -> np.ndarray:
        """[prompt + response] int32 tokens of a row."""
        return self._list("input_ids", row)

    def context(self, row: int) -> np.ndarray:
        """[spans, 2] where each part of a row begins and ends that is in its response and not trained on."""
        return self._list("context", row).reshape(-1, 2)

    def place(self, row: int) -> str:
        """Where a row came from, as `file:line`."""
        return self.table["place"][int(self.chosen[row])].as_py()

    def column(self, name: str) -> np.ndarray:
        """[rows] of a column of numbers."""
        return self._of_chosen(self.table[name].to_numpy())

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """[rows] tokens up to where the first answer begins."""
        return self.column("prompt_length").astype(np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[rows] tokens of prompt and response."""
        return self._list_lengths("input_ids")

    @cached_property
    def cut(self) -> np.ndarray:
        """[rows] whether the response lost its end when it was tokenized."""
        return self.column("cut").astype(bool)

    @cached_property
    def response_lengths(self) -> np.ndarray:
        """[rows] tokens after the prompt."""
        return self.lengths - self.prompt_lengths

    def fingerprint(self) -> str:
        """Tells these rows, in this order, from any others, and what they are mixed and ordered by."""
        digest = sha1(self.prompt_lengths)
        for name in ("source", "difficulty"):
            if self.table[name].null_count < len(self.table) and self.column(name).any():
                digest.update(self.column(name))
        for name in ("input_ids", "context"):
            digest.update(self._list_lengths(name))
            for part in self._lists(name):
                digest.update(part)
        return digest.hexdigest()

    def _of_chosen(self, values: np.ndarray) -> np.ndarray:
        return values if isinstance(self.chosen, range) else values[self.chosen]

    def _list_lengths(self, name: str) -> np.ndarray:
        return self._of_chosen(np.concatenate([np.diff(offsets) for offsets, _ in self._chunks[name]]).astype(np.int64))

    def _lists(self, name: str) -> Iterator[np.ndarray]:
        """All of a column, row after row: in chunks where no rows are chosen, which is fast."""
        if isinstance(self.chosen, range):
            yield from (values[offsets[0] : offsets[-1]] for offsets, values in self._chunks[name])
        else:
            yield from (self._list(name, row) for row in range(len(self)))

    def _list(self, name: str, row: int) -> np.ndarray:
        place = self.chosen[row]
        chunk = np.searchsorted(self._starts, place, side="right") - 1
        offsets, values = self._chunks[name][chunk]
        within = place - self._starts[chunk]
        return values[offsets[within] : offsets[within + 1]]


def _numpy(chunk: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a chunk, without a copy."""
    return chunk.offsets.to_numpy(), chunk.values.to_numpy()


def check_for_chats(tokenizer: PreTrainedTokenizerBase, loss_on: str = "last") -> None:
    """Refuse a tokenizer that cannot take chats.

    Raises:
        ValueError: it has no chat template, or it puts a space before each text: parts of a chat would not be what they
            are in the whole.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no chat template: name one by model.chat_template")
    if loss_on == "last":
        return
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids + ids) != "aa":
        raise ValueError(
            "data.loss_on=all: this tokenizer begins each text with a space, so that an answer in the middle of a chat "
            "would be in other tokens than in sampling; set data.loss_on=last"
        )


def prompt_ids(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, place: str = "the prompt") -> list[int]:
    """Tokens of a prompt, up to where the assistant begins; `place` names it in errors.

    Raises:
        ValueError: the tokenizer has no chat template, it refuses the messages, or their text has a mask token.
    """
    check_for_chats(tokenizer)
    ids = tokenizer(_render(messages, tokenizer, place), add_special_tokens=False)["input_ids"]
    _refuse_masks(ids, tokenizer, place)
    return ids


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes behind an answer, None where it writes none.

    A model that was trained on whole chats ends its answers with it: LLaDA with `<|eot_id|>`, Dream with `<|im_end|>`.
    """
    if tokenizer.chat_template is None:
        return None
    chat = [Message(role="user", content="Do you?"), Message(role="assistant", content="I do.")]
    try:
        _, found, behind = _render(chat, tokenizer, "a chat", generation=False).rpartition("I do.")
    except ValueError:  # it takes no answers
        return None
    ids = tokenizer(behind.strip(), add_special_tokens=False)["input_ids"] if found else []
    special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    return ids[0] if ids and ids[0] in special else None


def encode(
    chats: Sequence[Chat], places: Sequence[str], tokenizer: PreTrainedTokenizerBase, loss_on: str = "last"
) -> list[Encoded | ValueError]:
    """Chats in tokens, or what is wrong with them.

    Args:
        places: name the chats in errors.
        loss_on: `last`, the last answer · `all`, every answer, the earlier ones as the template writes them, with the
            mark that ends a turn.
    """
    end = turn_end(tokenizer) if loss_on == "all" else None
    mark = "" if end is None else tokenizer.convert_ids_to_tokens(end)
    parts: list[list[str] | ValueError] = []
    for chat, place in zip(chats, places, strict=True):
        try:
            parts.append(_parts(chat, tokenizer, loss_on, place, mark))
        except ValueError as error:
            parts.append(error)
    texts = [text for part in parts if isinstance(part, list) for text in part]
    before = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    answers = tokenizer([chat["response"] for chat in chats], add_special_tokens=False, return_offsets_mapping=True)
    encoded: list[Encoded | ValueError] = []
    for i, (part, place) in enumerate(zip(parts, places, strict=True)):
        if isinstance(part, ValueError):
            encoded.append(part)
            continue
        pieces = [next(before) for _ in part]
        counts = _count(chats[i]["response"], answers["offset_mapping"][i])
        row = _join([*pieces, [*answers["input_ids"][i], tokenizer.eos_token_id]], *counts)
        try:
            _refuse_masks(row.input_ids, tokenizer, place)
            encoded.append(row)
        except ValueError as error:
            encoded.append(error)
    return encoded


def _parts(chat: Chat, tokenizer: PreTrainedTokenizerBase, loss_on: str, place: str, mark: str) -> list[str]:
    """The text before the last answer, cut where what is trained on begins or ends: context, answer, …, context.

    Args:
        mark: what the template ends an answer with.

    Raises:
        ValueError: the template writes earlier answers in another way than it wrote them when they came, or begins the
            thinking that the answer has.
    """
    prompt = chat["prompt"]
    whole = _render(prompt, tokenizer, place)
    if whole.rstrip().endswith(THINK) and chat["response"].lstrip().startswith(THINK):
        raise ValueError(
            f"{place}: the chat template writes {THINK} before the answer, which has its own; choose another by "
            "model.chat_template"
        )
    if loss_on == "last":
        return [whole]
    parts, done = [], 0
    for i, message in enumerate(prompt):
        if message["role"] != "assistant":
            continue
        before = _render(prompt[:i], tokenizer, place)
        turn, content = _render(prompt[: i + 1], tokenizer, place, generation=False)[len(before) :], message["content"]
        said, found, behind = turn.partition(content.strip())
        # some templates begin the next answer whether or not that is asked for
        if mark and mark in behind:
            turn = said + found + behind.partition(mark)[0] + mark
        answer = turn.rstrip()
        if not (found and whole.startswith(before + answer)):
            raise ValueError(
                f"{place}: the chat template rewrites message {i + 1} when others follow, so it cannot be trained on "
                "there: set data.loss_on=last"
            )
        parts += [whole[done : len(before)], answer]
        done = len(before + answer)
    return [*parts, whole[done:]]


def _join(pieces: list[list[int]], thinking_tokens: int, answer_tokens: int, thinking_end: int) -> Encoded:
    """Context and answers by turns, context first, into one row; `thinking_end` counts from the last answer."""
    bounds = np.cumsum([0, *map(len, pieces)]).tolist()
    context = [bound for start in range(2, len(pieces), 2) for bound in bounds[start : start + 2]]
    ids = [token for piece in pieces for token in piece]
    return Encoded(ids, bounds[1], context, thinking_tokens, answer_tokens, bounds[-2] + thinking_end)


def _count(response: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
    """Tokens of the thinking, of the answer behind it, and up to where the thinking ends."""
    thinking, end, _ = response.rpartition(END_THINK)
    if not end:
        return 0, len(offsets), 0
    starts = [start for start, _ in offsets]
    begin = thinking.find(THINK) + len(THINK) if THINK in thinking else 0
    bounds = [begin, len(thinking), len(thinking + end)]
    first, last, answer = np.searchsorted(starts, bounds).tolist()
    return last - first, len(starts) - answer, last


def _render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, place: str, generation: bool = True
) -> str:
    roles = ", ".join(message["role"] for message in messages)
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = ONE_DAY + template
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=generation, tokenize=False
        )
    except Exception as error:  # a template is a program: it ends in whatever fails first
        raise ValueError(f"{place}: the chat template refuses messages of {roles}: {error}") from error
    for number, message in enumerate(messages, start=1):
        if message["role"] != "assistant" and message["content"].strip() not in text:
            raise ValueError(
                f"{place}: of messages of {roles} the chat template leaves out or rewrites number {number}; choose "
                "another by model.chat_template"
            )
    return text


def _refuse_masks(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id in ids:
        raise ValueError(f"{place}: the text contains the mask token {tokenizer.mask_token!r}")
