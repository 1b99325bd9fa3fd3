"""Rows ready to be trained on: curated, in tokens, and kept on disk for the next time."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import fields
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pyarrow as pa
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from pyarrow import ArrowException
from transformers import PreTrainedTokenizerBase

from data.chat import Chat, Columns, Message, needs_answer, schema_of, to_chat, to_prompt, unused
from data.config import DataConfig
from data.curation import Duplicates, Expression, Overlap
from data.files import digest, iterate
from data.readers import BadRows, PlacedRow
from data.report import Noted, Prepared, Report
from data.storage import digest_file, read_object, whole_directory
from data.tokens import SCHEMA, ControlTokens, Encoded, TokenRows, check_for_chats, encode

FORMAT = 5  # of the files; others are not read
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 1000, 2**18  # tokens as Python has them take some 250 bytes each

_Chat = tuple[int, PlacedRow, Chat]  # with the number of its source


class Preparation:
    """Turns rows into tokens, leaves out what the settings say, and keeps account of all of it.

    Args:
        name: of the rows, for the report.
        curated: whether filters, duplicates and overlaps are looked at; they are of training rows only.

    Raises:
        ValueError: a filter that cannot be read, or decontamination files that cannot.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str, curated: bool):
        self.config, self.tokenizer, self.report = config, tokenizer, Report(name)
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
        formulas = [formula for formula in (self.filter, self.difficulty) if formula]  # that run on these rows
        self.in_formulas = frozenset().union(*(formula.names for formula in formulas))
        # Rules by reason, in order: each returns a note for a row that it drops, else None.
        self.rules: dict[str, Callable[[Chat, str, Encoded], str | None]] = {}
        if config.truncation == "drop":
            self.rules[f"longer than data.max_length={config.max_length}"] = self._length_beyond
        if curated and config.decontaminate_files:
            overlap = Overlap(
                _questions(config.decontaminate_files, Columns(config.columns)), config.decontaminate_words
            )
            words = f"{config.decontaminate_words} words"
            self.rules[f"overlap in {words} with data.decontaminate_files"] = lambda chat, *_: overlap.find(chat)
        if curated and config.drop_duplicates != "none":
            duplicates = Duplicates(config.drop_duplicates, config.near_duplicate)
            reason = f"duplicates, data.drop_duplicates={config.drop_duplicates}"
            self.rules[reason] = lambda chat, place, _: duplicates.find(_with_tools(chat), place)
        self.report.dropped |= {reason: Noted() for reason in self.rules}

    def batches(self, sources: Mapping[str, Iterable[PlacedRow]]) -> Iterator[pa.RecordBatch]:
        """Tokens of all sources, in order, as SCHEMA says.

        Raises:
            ValueError: rows that cannot be used or are too long, unless the settings say what to do, or none is left.
        """
        yield from map(self._batch, _in_parts(self._chats(sources)))
        self.check()
        if not self.report.kept:
            raise ValueError(f"no row is left.\n{self.summary().text()}")

    def windows(
        self, sources: Mapping[str, Iterable[PlacedRow]], size: int, skip: int = 0
    ) -> Iterator[tuple[TokenRows, int]]:
        """The tokens of `size` chats at a time, after the first `skip`, and how many chats came up to their end.

        Does not raise on bad rows. Skipped rows are not counted.
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
        """Refuse what came so far and cannot be used, unless the settings say what to do.

        Raises:
            ValueError: naming the first rows of that kind, a formula that can be of no row, or a column of none.
        """
        self.columns.check()
        for formula in filter(None, (self.filter, self.difficulty)):
            formula.check()
        if self.config.on_bad_row == "error":
            self.bad.refuse()
        self.too_long.refuse()

    def summary(self) -> Report:
        """What became of the rows so far."""
        report = deepcopy(self.report)
        report.read += self.bad.count
        if self.bad.count or self.config.on_bad_row == "skip":
            report.add_bad(self.bad)
        return report

    def _chats(self, sources: Mapping[str, Iterable[PlacedRow]]) -> Iterator[_Chat]:
        """Yield (source index, row, chat). All rows of a source use the schema of its first valid row."""
        for name in sources:
            self.report.sources.setdefault(name, 0)
        for number, rows in enumerate(sources.values()):
            schema = None
            for placed in rows:
                try:
                    named = self.columns(placed)
                    found = schema_of(named.row)
                    if found != (schema or found):
                        raise ValueError(f"{placed.place}: a row with '{found}' among rows with '{schema}'")
                    chat = to_chat(named, self.in_formulas)
                    if needs_answer(named.row):
                        self.control.check_answered(chat["response"], placed.place)
                except ValueError as error:
                    self.bad.add(error)
                else:
                    schema = found
                    self.report.add_unused(name for name in unused(named.row) if name not in self.in_formulas)
                    yield number, placed, chat

    def _batch(self, chats: list[_Chat]) -> pa.RecordBatch:
        batch = pa.RecordBatch.from_pylist(list(self._kept(chats)), SCHEMA)
        self.report.keep(TokenRows(pa.Table.from_batches([batch])))
        return batch

    def _kept(self, chats: list[_Chat]) -> Iterator[dict]:
        """Rows in tokens that are not left out, as SCHEMA says."""
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
            if filtered:
                self.report.drop(self.filtered, f"{place} {_excerpt(chat)}")
            elif left_out := self._left_out(chat, place, row):
                reason, note = left_out
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

    def _left_out(self, chat: Chat, place: str, row: Encoded) -> tuple[str, str] | None:
        """Return (reason, note) if a rule drops the row. Duplicates are checked last, against kept rows only."""
        return next(((reason, note) for reason, rule in self.rules.items() if (note := rule(chat, place, row))), None)

    def _length_beyond(self, chat: Chat, place: str, row: Encoded) -> str | None:
        return f"{len(row.input_ids)} tokens" if len(row.input_ids) > self.config.max_length else None


def _in_parts(chats: Iterable[_Chat]) -> Iterator[list[_Chat]]:
    """As many at a time as can be tokenized together in little memory."""
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


def rows_of(
    sources: Mapping[str, Iterable[PlacedRow]],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "training",
    curated: bool = True,
) -> Prepared:
    """Rows in memory, ready to be trained on.

    Args:
        sources: rows by the name of where they come from.

    Raises:
        ValueError: see `Preparation`.
    """
    preparation = Preparation(config, tokenizer, name, curated)
    rows = TokenRows(pa.Table.from_batches(preparation.batches(sources), SCHEMA))
    return Prepared(rows, preparation.summary())


def rows_of_files(
    files: Iterable[str], config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str, curated: bool
) -> Prepared:
    """Rows of files, ready to be trained on, mapped from disk; tokenized only if that has not been done before.

    What is kept goes by the content of the files, the tokenizer with its template, and the settings. Of several
    processes that want the same rows one prepares them and the others wait. Rows appear only when all are there.

    Raises:
        ValueError: see `Preparation` and `data.files.iterate`.
    """
    cache = Path(config.cache_dir or Path(HF_HOME) / "diffllm").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    key = _key(files, config, tokenizer, curated)
    directory = cache / key
    if not directory.exists():
        with FileLock(f"{directory}.lock", mode=0o666):  # also other users' processes wait
            if not directory.exists():
                with whole_directory(directory) as unfinished:
                    _build(files, config, tokenizer, name, curated, unfinished)
                    if _key(files, config, tokenizer, curated) != key:
                        raise ValueError("data.train_files or data.val_files changed while they were read: start again")
    try:
        saved = read_object(directory / "report.json")
        rows, report = _mapped(directory), Report.from_json(saved["report"] | {"name": name})
        if len(rows) != report.kept:
            raise ValueError(f"{len(rows)} of {report.kept} rows are there")
        if digest_file(directory / "rows.arrow") != saved["digest"]:
            raise ValueError("rows.arrow was changed")
        return Prepared(rows, report)
    except (ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory}: these tokenized rows cannot be read ({error}); delete the directory") from error


def _build(
    files: Iterable[str],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    curated: bool,
    directory: Path,
) -> None:
    preparation = Preparation(config, tokenizer, name, curated)
    sources = {file: iterate(file, preparation.bad) for file in files}
    with pa.ipc.new_stream(str(directory / "rows.arrow"), SCHEMA) as written:
        for batch in preparation.batches(sources):
            written.write(batch)
    saved = {"digest": digest_file(directory / "rows.arrow"), "report": preparation.summary().to_json()}
    (directory / "report.json").write_text(json.dumps(saved))


def _mapped(directory: Path) -> TokenRows:
    return TokenRows(pa.ipc.open_stream(pa.memory_map(str(directory / "rows.arrow"))).read_all())


def _key(files: Iterable[str], config: DataConfig, tokenizer: PreTrainedTokenizerBase, curated: bool) -> str:
    changed = ("all", "curated") if curated else ("all",)
    settings = [item.name for item in fields(config) if item.metadata.get("changes_rows") in changed]
    content = {
        "format": FORMAT,
        "files": [(file, digest(file)) for file in files],
        "decontaminate": [digest(file) for file in config.decontaminate_files if curated],
        "settings": {name: getattr(config, name) for name in settings},
        "tokenizer": tokenizer_digest(tokenizer),
    }
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _questions(files: Iterable[str], columns: Columns) -> Iterator[tuple[list[Message], str]]:
    """What is asked in an evaluation set, and where."""
    bad = BadRows("This is of data.decontaminate_files, all questions of which are needed")
    for file in files:
        for placed in iterate(file, bad):
            try:
                yield to_prompt(columns(placed)), placed.place
            except ValueError as error:
                bad.add(error)
    bad.refuse()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Tells a tokenizer and its chat template from others."""
    special = (tokenizer.special_tokens_map, tokenizer.split_special_tokens)
    content = [tokenizer.backend_tokenizer.to_str(), special, tokenizer.chat_template]
    return sha256(json.dumps(content, default=str).encode()).hexdigest()


def _with_tools(chat: Chat) -> Chat:
    """A chat whose tools are a message, so that what compares messages sees them."""
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
    asked = next(message["content"] for message in chat["prompt"] if message["role"] == "user")
    text = " ".join(asked.split())
    return repr(text if len(text) <= size else text[: size - 1] + "…")
