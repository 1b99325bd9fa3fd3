"""Rows ready to be trained on: curated, in tokens, and kept on disk for the next time."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pyarrow as pa
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from pyarrow import ArrowException
from transformers import PreTrainedTokenizerBase

from data.chat import Chat, Message, schema_of, to_chat, to_prompt
from data.config import DataConfig
from data.curation import Duplicates, Expression, Overlap
from data.files import digest, iterate
from data.readers import BadRows, PlacedRow
from data.report import Prepared, Report
from data.tokens import SCHEMA, Encoded, TokenRows, check_for_chats, encode

FORMAT = 1  # of the files; others are not read
ROWS_AT_ONCE = 1000
KEYED = (
    "on_bad_row",
    "loss_on",
    "filter",
    "drop_duplicates",
    "near_duplicate",
    "decontaminate_words",
    "order",
    "difficulty",
    "max_length",
    "truncation",
)


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
        self.bad = BadRows(". data.on_bad_row=skip leaves them out")
        check_for_chats(tokenizer, config.loss_on)
        others = " or right" if config.truncation == "error" else ""
        self.too_long = BadRows(f". Raise data.max_length, or set data.truncation=drop{others}")
        self.filter = self.duplicates = self.overlap = self.difficulty = None
        if not curated:
            return
        if config.filter is not None:
            self.filter = Expression(config.filter, "data.filter")
        if config.order == "curriculum":
            self.difficulty = Expression(config.difficulty, "data.difficulty")
        if config.drop_duplicates != "none":
            self.duplicates = Duplicates(config.drop_duplicates, config.near_duplicate)
        if config.decontaminate_files:
            self.overlap = Overlap(_questions(config.decontaminate_files), config.decontaminate_words)

    def batches(self, sources: Mapping[str, Iterable[PlacedRow]]) -> Iterator[pa.RecordBatch]:
        """Tokens of all sources, in order, as SCHEMA says.

        Raises:
            ValueError: rows that cannot be used or are too long, unless the settings say what to do, or none is left.
        """
        yield from self.blocks(sources, ROWS_AT_ONCE)
        self.check()
        self.report = self.summary()
        if not any(self.report.sources.values()):
            raise ValueError(f"no row is left.\n{self.report.text()}")

    def blocks(self, sources: Mapping[str, Iterable[PlacedRow]], size: int, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """The same without a check at the end, `size` chats at a time, after the first `skip`; `taken` counts them.

        What is skipped is in no account.
        """
        names = list(sources)
        for name in names:
            self.report.sources.setdefault(name, 0)
        chats = self._chats(sources)
        self.taken = sum(1 for _ in islice(chats, skip))
        if skip:
            self.bad.forget()
        while block := list(islice(chats, size)):
            kept = self._block(block)
            for row in kept:
                self.report.sources[names[row["source"]]] += 1
            self.taken += len(block)
            yield pa.RecordBatch.from_pylist(kept, SCHEMA)

    def check(self) -> None:
        """Refuse what came so far and cannot be used, unless the settings say what to do.

        Raises:
            ValueError: naming the first rows of that kind.
        """
        if self.config.on_bad_row == "error":
            self.bad.refuse()
        self.too_long.refuse()

    def summary(self) -> Report:
        """What became of the rows so far."""
        report = replace(self.report, read=self.report.read + self.bad.count, dropped=dict(self.report.dropped))
        report.kept = sum(report.sources.values())
        report.add_bad(self.bad)
        return report

    def _chats(self, sources: Mapping[str, Iterable[PlacedRow]]) -> Iterator[tuple[int, PlacedRow, Chat]]:
        """Rows as chats, each with the number of its source, whose rows are of one schema."""
        for number, rows in enumerate(sources.values()):
            schema = None
            for placed in rows:
                found = schema_of(placed.row)
                schema = schema or found
                try:
                    if found != schema:
                        raise ValueError(f"{placed.place}: a row with '{found}' among rows with '{schema}'")
                    chat = to_chat(placed)
                except ValueError as error:
                    self.bad.add(error)
                else:
                    yield number, placed, chat

    def _block(self, block: list[tuple[int, PlacedRow, Chat]]) -> list[dict]:
        sources, rows, chats = zip(*block, strict=True)
        encoded = encode(chats, [placed.place for placed in rows], self.tokenizer, self.config.loss_on)
        kept = []
        for source, placed, chat, row in zip(sources, rows, chats, encoded, strict=True):
            try:
                if isinstance(row, ValueError):
                    raise row
                fields = {**placed.row, **_counts(row)}
                filtered = self.filter is not None and not self.filter(fields, placed.place)
                difficulty = None
                if self.difficulty is not None and not filtered:
                    difficulty = self._difficulty_of(fields, placed.place)
            except ValueError as error:
                self.bad.add(error)
                continue
            self.report.read += 1
            reason = self._reason_to_drop(filtered, placed.place, chat, row)
            if reason is not None:
                self.report.drop(reason[0], f"{placed.place} {_excerpt(chat)}{reason[1]}")
                continue
            cut = len(row.input_ids) > self.config.max_length
            if cut:
                self.report.cut.add(f"{placed.place} {_excerpt(chat)}")
            kept.append(
                row._asdict()
                | {"input_ids": row.input_ids[: self.config.max_length], "cut": int(cut), "source": source}
                | {"difficulty": difficulty, "place": placed.place}
            )
        return kept

    def _reason_to_drop(self, filtered: bool, place: str, chat: Chat, row: Encoded) -> tuple[str, str] | None:
        """Why a row is left out, and what of this row; None keeps it. A duplicate is one of a row that is kept."""
        config = self.config
        if filtered:
            return f"left out by data.filter={config.filter}", ""
        if self._too_long(place, row):
            return f"longer than data.max_length={config.max_length}", f" ({len(row.input_ids)} tokens)"
        if self.overlap is not None and (question := self.overlap.find(chat)):
            return f"overlap in {config.decontaminate_words} words with data.decontaminate_files", f" ({question})"
        if self.duplicates is not None and (earlier := self.duplicates.find(chat, place)):
            return f"duplicates, data.drop_duplicates={config.drop_duplicates}", f" (as {earlier})"
        return None

    def _too_long(self, place: str, row: Encoded) -> bool:
        """Whether a row is to be dropped as too long; where that is an error it is noted."""
        limit, truncation = self.config.max_length, self.config.truncation
        room = row.prompt_length < limit
        if room and (len(row.input_ids) <= limit or truncation == "right"):
            return False
        if truncation != "drop":
            response = len(row.input_ids) - row.prompt_length
            self.too_long.add(
                f"{place}: {row.prompt_length} prompt and {response} response tokens do not fit data.max_length={limit}"
            )
        return True

    def _difficulty_of(self, fields: dict, place: str) -> float:
        value = self.difficulty(fields, place)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{place}: data.difficulty={self.config.difficulty} must be a number, it is {value!r}")
        return float(value)


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
    preparation.report.measure(rows)
    return Prepared(rows, preparation.report)


def rows_of_files(
    files: Iterable[str], config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str, curated: bool
) -> Prepared:
    """Rows of files, ready to be trained on, mapped from disk; tokenized only if that has not been done before.

    What is kept goes by the content of the files, the tokenizer with its template, and the settings. Of several
    processes that want the same rows one prepares them and the others wait. Rows appear only when all are there.

    Raises:
        ValueError: see `Preparation` and `data.files.iterate`.
    """
    cache = Path(config.cache_dir or Path(HF_HOME) / "diffllm")
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / _key(files, config, tokenizer, curated)
    if not directory.exists():
        with FileLock(f"{directory}.lock", mode=0o666):  # also other users' processes wait
            if not directory.exists():
                unfinished = Path(f"{directory}.unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
                unfinished.mkdir()
                try:
                    _build(files, config, tokenizer, name, curated, unfinished)
                    os.rename(unfinished, directory)
                except BaseException:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    raise
    try:
        rows = _mapped(directory)
        report = json.loads((directory / "report.json").read_text())
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{directory}: these tokenized rows cannot be read ({error}); delete the directory") from error
    return Prepared(rows, Report.from_json(report | {"name": name}))


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
    preparation.report.measure(_mapped(directory))
    (directory / "report.json").write_text(json.dumps(preparation.report.to_json()))


def _mapped(directory: Path) -> TokenRows:
    return TokenRows(pa.ipc.open_stream(pa.memory_map(str(directory / "rows.arrow"))).read_all())


def _key(files: Iterable[str], config: DataConfig, tokenizer: PreTrainedTokenizerBase, curated: bool) -> str:
    content = {
        "format": FORMAT,
        "files": [(file, digest(file)) for file in files],
        "decontaminate": [digest(file) for file in config.decontaminate_files],
        "settings": {name: value for name, value in asdict(config).items() if name in KEYED},
        "curated": curated,
        "tokenizer": tokenizer_digest(tokenizer),
    }
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _questions(files: Iterable[str]) -> Iterator[tuple[list[Message], str]]:
    """What is asked in an evaluation set, and where."""
    bad = BadRows()
    for file in files:
        for placed in iterate(file, bad):
            try:
                yield to_prompt(placed), placed.place
            except ValueError as error:
                bad.add(error)
    bad.refuse()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Tells a tokenizer and its chat template from others."""
    content = [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template]
    return sha256(json.dumps(content, default=str).encode()).hexdigest()


def _counts(row: Encoded) -> dict[str, int]:
    return {
        "prompt_tokens": row.prompt_length,
        "response_tokens": len(row.input_ids) - row.prompt_length,
        "thinking_tokens": row.thinking_tokens,
        "answer_tokens": row.answer_tokens,
    }


def _excerpt(chat: Chat, size: int = 60) -> str:
    text = " ".join(chat["prompt"][-1]["content"].split())
    return repr(text if len(text) <= size else text[: size - 1] + "…")
