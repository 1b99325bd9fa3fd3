"""Tokenize rows and drop some by the rules of the settings, with a report."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import islice

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from data.chat import Chat, Columns, Message, needs_answer, schema_of, to_chat, to_prompt, unused, without_thinking
from data.config import DataConfig
from data.control_tokens import ControlTokens
from data.curation import Duplicates, Expression, Overlap
from data.encode import Encoded, encode
from data.errors import BadRows
from data.files import iterate
from data.readers import PlacedRow
from data.report import Noted, Report
from data.template import check_for_chats
from data.token_rows import SCHEMA, TokenRows

ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 1000, 2**18  # a token takes some 250 bytes as Python objects

_PlacedChat = tuple[int, PlacedRow, Chat]  # (source index, row, chat)


class Preparation:
    """Tokenizes rows, drops rows by the rules of the settings, and counts both in a report.

    Args:
        name: title of the report.
        curated: whether filters, duplicates and overlaps apply; true for training rows only.

    Raises:
        ValueError: a formula or a decontamination file cannot be read, or the tokenizer cannot take chats.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str, curated: bool):
        self.config, self.tokenizer, self.report = config, tokenizer, Report(name, max_length=config.max_length)
        self.bad = BadRows("data.on_bad_row=skip leaves such rows out")
        check_for_chats(tokenizer, config.loss_on)
        self.control = ControlTokens(tokenizer)
        self.too_long = BadRows("Raise data.max_length, or set data.truncation=drop or right")
        self.filter = self.difficulty = None
        self.columns = Columns(config.columns)
        if config.truncation == "right":
            self.report.cut = Noted()
        if curated and config.filter is not None:
            self.filter = Expression(config.filter, "data.filter", bool)
            self.filtered = f"left out by data.filter={config.filter}"
            self.report.dropped[self.filtered] = Noted()
        if curated and config.order == "curriculum":
            self.difficulty = Expression(config.difficulty, "data.difficulty", float)
        formulas = [formula for formula in (self.filter, self.difficulty) if formula]
        self.in_formulas = frozenset().union(*(formula.names for formula in formulas))
        # Rules in order, by their reason in the report. A rule returns a note on a row to drop, else None.
        self.rules: dict[str, Callable[[Chat, str, Encoded], str | None]] = {}
        if config.truncation == "drop":
            self.rules[f"longer than data.max_length={config.max_length}"] = self._length_beyond
        if curated and config.decontaminate_files:
            n = config.decontaminate_words
            overlap = Overlap(_questions(config.decontaminate_files, Columns(config.columns)), n)
            self.rules[f"overlap in {n} words with data.decontaminate_files"] = lambda chat, *_: overlap.find(chat)
        if curated and config.drop_duplicates != "none":
            duplicates = Duplicates(config.drop_duplicates, config.near_duplicate)
            reason = f"duplicates, data.drop_duplicates={config.drop_duplicates}"
            self.rules[reason] = lambda chat, place, _: duplicates.find(_with_tools(chat), place)
        self.report.dropped |= {reason: Noted() for reason in self.rules}

    def batches(self, sources: Mapping[str, Iterable[PlacedRow]]) -> Iterator[pa.RecordBatch]:
        """Yield the token rows of all sources in order, as batches of SCHEMA.

        Raises:
            ValueError: a source has rows of several schemas; see `check`; or no row is left.
        """
        yield from map(self._batch, _in_parts(self._chats(sources)))
        self.check()
        if not self.report.kept:
            raise ValueError(f"no row is left.\n{self.summary().text()}")

    def windows(
        self, sources: Mapping[str, Iterable[PlacedRow]], size: int, skip: int = 0
    ) -> Iterator[tuple[TokenRows, int]]:
        """Yield (token rows of the next `size` chats, number of chats so far).

        Does not raise on bad rows: call `check`.

        Args:
            skip: chats to skip first; they are neither tokenized nor reported.
        """
        chats = self._chats(sources)
        taken = sum(1 for _ in islice(chats, skip))
        if skip:
            self.bad.forget()
            self.report.unused.clear()
        while parts := [(self._batch(part), len(part)) for part in _in_parts(islice(chats, size))]:
            batches, counts = zip(*parts, strict=True)
            taken += sum(counts)
            yield TokenRows(pa.Table.from_batches(batches, SCHEMA)), taken

    def check(self) -> None:
        """Check the rows so far.

        Raises:
            ValueError: no row has a column of data.columns; a formula fails on every row; rows cannot be used, unless
                data.on_bad_row=skip; or rows are too long, unless data.truncation handles them.
        """
        self.columns.check()
        for formula in filter(None, (self.filter, self.difficulty)):
            formula.check()
        if self.config.on_bad_row == "error":
            self.bad.refuse()
        self.too_long.refuse()

    def summary(self) -> Report:
        """Report on the rows so far."""
        report = deepcopy(self.report)
        report.read += self.bad.count
        if self.bad.count or self.config.on_bad_row == "skip":
            report.add_bad(self.bad)
        return report

    def _chats(self, sources: Mapping[str, Iterable[PlacedRow]]) -> Iterator[_PlacedChat]:
        """Yield (source index, row, chat). All rows of a source use the schema of its first valid row."""
        for name in sources:
            self.report.sources.setdefault(name, 0)
        for number, rows in enumerate(sources.values()):
            schema = None
            for placed in rows:
                try:
                    named = self.columns(placed)
                    chat = to_chat(named, self.in_formulas)
                    if self.config.thinking == "drop":
                        chat = without_thinking(chat, placed.place)
                    if needs_answer(named.row):
                        self.control.check_answered(chat["response"], placed.place)
                except ValueError as error:
                    self.bad.add(error)
                    continue
                found = schema_of(named.row)
                schema = schema or found
                if found != schema:
                    self._add_other_schema(f"{placed.place}: a row with '{found}' among rows with '{schema}'")
                else:
                    self.report.add_unused(name for name in unused(named.row) if name not in self.in_formulas)
                    yield number, placed, chat

    def _add_other_schema(self, problem: str) -> None:
        """Add a row to the bad ones.

        Raises:
            ValueError: unless data.on_bad_row=skip, at once: skipping such rows would lose a part of the set.
        """
        if self.config.on_bad_row == "error":
            raise ValueError(f"{problem}: put the rows of each schema into a file of their own")
        self.bad.add(problem)

    def _batch(self, chats: list[_PlacedChat]) -> pa.RecordBatch:
        batch = pa.RecordBatch.from_pylist(list(self._kept(chats)), SCHEMA)
        self.report.keep(TokenRows(pa.Table.from_batches([batch])))
        return batch

    def _kept(self, chats: list[_PlacedChat]) -> Iterator[dict]:
        """Yield the kept rows of SCHEMA."""
        limit = self.config.max_length
        places = [placed.place for _, placed, _ in chats]
        encoded = encode([chat for *_, chat in chats], places, self.tokenizer, self.config.loss_on)
        for (source, placed, chat), place, row in zip(chats, places, encoded, strict=True):
            try:
                if isinstance(row, ValueError):
                    raise row
                fields = {**placed.row, **_counts(row)}
                filtered = self.filter is not None and not self.filter(fields, place)
                if self.config.truncation == "right" and row.prompt_length >= limit and not filtered:
                    raise ValueError(f"{place}: data.max_length={limit} cuts the prompt of {row.prompt_length} tokens")
                ranked = self.difficulty is not None and not filtered
                difficulty = self.difficulty(fields, place) if ranked else None
            except ValueError as error:
                self.bad.add(error)
                continue
            self.report.read += 1
            if row.control:
                self.report.control_tokens.add(f"{place} {_excerpt(chat)}")
            fits = len(row.input_ids) <= limit
            self.report.whole[len(row.input_ids)] += not filtered
            if filtered:
                self.report.drop(self.filtered, f"{place} {_excerpt(chat)}")
            elif broken := self._broken_rule(chat, place, row):
                reason, note = broken
                self.report.drop(reason, f"{place} {_excerpt(chat)} ({note})")
            elif fits or self.config.truncation == "right":
                placed = {"cut": int(not fits), "source": source, "difficulty": difficulty, "place": place}
                yield row.until(limit)._asdict() | placed
            else:
                response = len(row.input_ids) - row.prompt_length
                self.too_long.add(
                    f"{place}: {row.prompt_length} prompt and {response} response tokens do not fit "
                    f"data.max_length={limit}"
                )

    def _broken_rule(self, chat: Chat, place: str, row: Encoded) -> tuple[str, str] | None:
        """Return (reason, note) if a rule drops the row. Duplicates are checked last, against kept rows only."""
        return next(((reason, note) for reason, rule in self.rules.items() if (note := rule(chat, place, row))), None)

    def _length_beyond(self, chat: Chat, place: str, row: Encoded) -> str | None:
        return f"{len(row.input_ids)} tokens" if len(row.input_ids) > self.config.max_length else None


def _in_parts(chats: Iterable[_PlacedChat]) -> Iterator[list[_PlacedChat]]:
    """Split chats into parts that are small enough to be tokenized in one call."""
    part, characters = [], 0
    for item in chats:
        part.append(item)
        *_, chat = item
        characters += sum(len(message["content"]) for message in chat["prompt"]) + len(chat["response"])
        characters += len(str(chat["tools"])) if "tools" in chat else 0
        if len(part) == ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield part
            part, characters = [], 0
    if part:
        yield part


def _questions(files: Iterable[str], columns: Columns) -> Iterator[tuple[list[Message], str]]:
    """Yield (messages, place) of each question of the evaluation sets.

    Raises:
        ValueError: a row cannot be used.
    """
    bad = BadRows("Correct these rows of data.decontaminate_files: all are needed")
    for file in files:
        for placed in iterate(file, bad):
            try:
                yield to_prompt(columns(placed)), placed.place
            except ValueError as error:
                bad.add(error)
    bad.refuse()


def _with_tools(chat: Chat) -> Chat:
    """Add the tools as first message, so that chats with different tools are not duplicates."""
    if "tools" not in chat:
        return chat
    return chat | {"prompt": [Message(role="tools", content=json.dumps(chat["tools"])), *chat["prompt"]]}


def _counts(row: Encoded) -> dict[str, int]:
    return {
        "prompt_tokens": row.prompt_length,
        "response_tokens": len(row.input_ids) - row.prompt_length,
        "thinking_tokens": row.thinking_tokens,
        "answer_tokens": row.answer_tokens,
    }


def _excerpt(chat: Chat, size: int = 60) -> str:
    question = next(message["content"] for message in chat["prompt"] if message["role"] == "user")
    text = " ".join(question.split())
    return repr(text if len(text) <= size else text[: size - 1] + "…")
