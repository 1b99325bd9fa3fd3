"""Rows ready to be trained on: curated, in tokens, and kept on disk for the next time."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
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
from data.report import Noted, Prepared, Report
from data.tokens import SCHEMA, Encoded, TokenRows, check_for_chats, encode

FORMAT = 2  # of the files; others are not read
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
        self.bad = BadRows("data.on_bad_row=skip leaves such rows out")
        check_for_chats(tokenizer, config.loss_on)
        others = " or right" if config.truncation == "error" else ""
        self.too_long = BadRows(f"Raise data.max_length, or set data.truncation=drop{others}")
        self.filter = self.duplicates = self.overlap = self.difficulty = None
        if curated and config.filter is not None:
            self.filter = Expression(config.filter, "data.filter", bool)
            self.filtered = self._reason(f"left out by data.filter={config.filter}")
        if config.truncation == "drop":
            self.longer = self._reason(f"longer than data.max_length={config.max_length}")
        if curated and config.decontaminate_files:
            self.overlap = Overlap(_questions(config.decontaminate_files), config.decontaminate_words)
            words = f"{config.decontaminate_words} words"
            self.overlapping = self._reason(f"overlap in {words} with data.decontaminate_files")
        if curated and config.drop_duplicates != "none":
            self.duplicates = Duplicates(config.drop_duplicates, config.near_duplicate)
            self.duplicated = self._reason(f"duplicates, data.drop_duplicates={config.drop_duplicates}")
        if curated and config.order == "curriculum":
            self.difficulty = Expression(config.difficulty, "data.difficulty", float)

    def batches(self, sources: Mapping[str, Iterable[PlacedRow]]) -> Iterator[pa.RecordBatch]:
        """Tokens of all sources, in order, as SCHEMA says.

        Raises:
            ValueError: rows that cannot be used or are too long, unless the settings say what to do, or none is left.
        """
        yield from self.blocks(sources, ROWS_AT_ONCE)
        self.check()
        self.report = self.summary()
        if not self.report.kept:
            raise ValueError(f"no row is left.\n{self.report.text()}")

    def blocks(self, sources: Mapping[str, Iterable[PlacedRow]], size: int, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """The same without a check at the end, `size` chats at a time, after the first `skip`; `taken` counts them.

        What is skipped is in no account.
        """
        for name in sources:
            self.report.sources.setdefault(name, 0)
        chats = self._chats(sources)
        self.taken = sum(1 for _ in islice(chats, skip))
        if skip:
            self.bad.forget()
        while block := list(islice(chats, size)):
            kept = pa.RecordBatch.from_pylist(list(self._kept(block)), SCHEMA)
            self.report.keep(TokenRows(pa.Table.from_batches([kept])))
            self.taken += len(block)
            yield kept

    def check(self) -> None:
        """Refuse what came so far and cannot be used, unless the settings say what to do.

        Raises:
            ValueError: naming the first rows of that kind, or a formula that can be of no row.
        """
        for formula in filter(None, (self.filter, self.difficulty)):
            formula.check()
        if self.config.on_bad_row == "error":
            self.bad.refuse()
        self.too_long.refuse()

    def summary(self) -> Report:
        """What became of the rows so far."""
        report = deepcopy(self.report)
        report.read += self.bad.count
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

    def _kept(self, block: list[tuple[int, PlacedRow, Chat]]) -> Iterator[dict]:
        """Rows in tokens that are not left out, as SCHEMA says."""
        sources, rows, chats = zip(*block, strict=True)
        limit = self.config.max_length
        encoded = encode(chats, [placed.place for placed in rows], self.tokenizer, self.config.loss_on)
        for source, (fields, place), chat, row in zip(sources, rows, chats, encoded, strict=True):
            try:
                if isinstance(row, ValueError):
                    raise row
                fields = {**fields, **_counts(row)}
                filtered = self.filter is not None and not self.filter(fields, place)
                ranked = self.difficulty is not None and not filtered
                difficulty = float(self.difficulty(fields, place)) if ranked else None
            except ValueError as error:
                self.bad.add(error)
                continue
            self.report.read += 1
            fits = len(row.input_ids) <= limit
            fits_cut = self.config.truncation == "right" and row.prompt_length < limit
            if dropped := self._dropped(filtered, fits or fits_cut, place, chat, row):
                reason, note = dropped
                self.report.drop(reason, f"{place} {_excerpt(chat)}{note}")
                continue
            if not (fits or fits_cut):
                self.too_long.add(
                    f"{place}: {row.prompt_length} prompt and {len(row.input_ids) - row.prompt_length} response tokens "
                    f"do not fit data.max_length={limit}"
                )
                continue
            if not fits:
                self.report.cut.show(f"{place} {_excerpt(chat)}")
            placed = {"cut": int(not fits), "source": source, "difficulty": difficulty, "place": place}
            yield row.until(limit)._asdict() | placed

    def _reason(self, text: str) -> str:
        """A reason to drop rows, which the report has whether or not it drops any."""
        self.report.dropped[text] = Noted()
        return text

    def _dropped(self, filtered: bool, fits: bool, place: str, chat: Chat, row: Encoded) -> tuple[str, str] | None:
        """Why a row is left out, and what of this row; None keeps it. A duplicate is one of a row that is kept."""
        if filtered:
            return self.filtered, ""
        if not fits:
            return (self.longer, f" ({len(row.input_ids)} tokens)") if self.config.truncation == "drop" else None
        if self.overlap is not None and (question := self.overlap.find(chat)):
            return self.overlapping, f" ({question})"
        if self.duplicates is not None and (earlier := self.duplicates.find(chat, place)):
            return self.duplicated, f" (as {earlier})"
        return None


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
    asked = next(message["content"] for message in chat["prompt"] if message["role"] == "user")
    text = " ".join(asked.split())
    return repr(text if len(text) <= size else text[: size - 1] + "…")
