"""Report on rows read, kept and dropped, and on their lengths, as text and JSON."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.errors import BadRows, listed
from data.storage import read_object, write_object
from data.terminal import printable, table
from data.token_rows import TokenRows

FILE = "data_report.json"
EXAMPLES = 3  # per reason
MAX_UNUSED = 1000  # columns
MANY = 0.1  # share of rows that are too long, above which the report warns
PERCENTILES = (5, 50, 95, 99, 100)
PARTS = ("prompt", "response", "thinking", "answer")


@dataclass
class Noted:
    """Number of rows, and the first EXAMPLES of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Count a row."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass
class Report:
    """Row statistics in constant memory."""

    name: str
    read: int = 0
    kept: int = 0
    trained: int | None = None  # rows trained on; only for streams, which read ahead
    dropped: dict[str, Noted] = field(default_factory=dict)  # by reason, in the order of the rules
    cut: Noted | None = None  # rows with a cut response; None unless data.truncation=right
    answerless: int = 0  # cut rows that lost the whole last answer
    control_tokens: Noted = field(default_factory=Noted)  # rows read, with control tokens in their texts
    unused: dict[str, int] = field(default_factory=dict)  # rows that fill a column which nothing reads, by column
    sources: dict[str, int] = field(default_factory=dict)  # rows kept, by source
    epoch: dict[str, int] = field(default_factory=dict)  # rows of the first epoch, by source
    # rows by token count, for each part; thinking and answer are those of the last answer
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: {part: Counter() for part in PARTS})
    max_length: int | None = None  # of a row, in tokens
    whole: Counter[int] = field(default_factory=Counter)  # rows by token count, before they are cut or dropped
    padding_share: float | None = None  # share of forwarded positions

    def drop(self, reason: str, example: str) -> None:
        """Count a dropped row."""
        self.dropped.setdefault(reason, Noted()).add(example)

    def add_bad(self, bad: BadRows) -> None:
        """Count unusable rows as dropped."""
        self.dropped = {"cannot be used": Noted(bad.count, bad.named), **self.dropped}

    def add_unused(self, columns: Iterable[str]) -> None:
        """Count a row for each of its unused columns."""
        for name in columns:
            if name in self.unused or len(self.unused) < MAX_UNUSED:
                self.unused[name] = self.unused.get(name, 0) + 1

    def keep(self, rows: TokenRows) -> None:
        """Count kept rows."""
        answers = rows.column("answer_tokens")
        self.kept += len(rows)
        if self.cut:
            self.cut.count += int(rows.cut.sum())
            more = EXAMPLES - len(self.cut.examples)
            self.cut.examples += [rows.place(row) for row in np.flatnonzero(rows.cut)[:more]]
            self.answerless += int((rows.cut & (answers == 0)).sum())
        counts = np.bincount(rows.column("source"), minlength=len(self.sources)).tolist()
        self.sources = {name: before + new for (name, before), new in zip(self.sources.items(), counts, strict=True)}
        columns = (rows.prompt_lengths, rows.response_lengths, rows.column("thinking_tokens"), answers)
        for part, values in zip(PARTS, columns, strict=True):
            self.lengths[part].update(values.tolist())

    def keep_only(self, rows: TokenRows, chosen: np.ndarray, reason: str) -> TokenRows:
        """Return the `chosen` of the kept rows; count the others as dropped for the reason."""
        others = np.setdiff1d(np.arange(len(rows)), chosen)
        self.dropped[reason] = Noted(len(others), [rows.place(row) for row in others[:EXAMPLES]])
        self.kept = self.answerless = 0
        self.cut = self.cut and Noted()
        self.sources = dict.fromkeys(self.sources, 0)
        self.lengths = {part: Counter() for part in PARTS}
        kept = rows.select(chosen)
        self.keep(kept)
        return kept

    def tokens(self) -> dict[str, dict[str, int]]:
        """Length percentiles of each part; thinking and answer only if some row has thinking."""
        return {
            part: {f"p{p}": value for p, value in zip(PERCENTILES, percentiles(self.lengths[part]), strict=True)}
            for part in (PARTS if any(self.lengths["thinking"]) else PARTS[:2])
            if self.lengths[part]
        }

    def warning(self) -> str | None:
        """A line on rows that are too long, if they are many, with the share that longer limits would keep whole."""
        total = self.whole.total()

        def fitting(limit: int) -> float:
            return sum(count for length, count in self.whole.items() if length <= limit) / total

        if self.max_length is None or not total or fitting(self.max_length) >= 1 - MANY:
            return None
        limits, limit = [], self.max_length
        while fitting(limit) < 1 - MANY / 10:
            kept, limit = fitting(limit), 2 * limit
            if fitting(limit) > kept:
                limits.append(f"{limit:,} would keep {fitting(limit):.0%} whole")
        return (
            f"WARNING: {1 - fitting(self.max_length):.0%} of the rows exceed data.max_length={self.max_length} and are "
            f"{'cut' if self.cut else 'dropped'}; {', '.join(limits)}"
        )

    def text(self) -> str:
        """Report as lines for the terminal."""
        trained = "" if self.trained is None else f" read, {self.trained:,} trained on"
        lines = [f"{self.name}: {self.kept:,} of {self.read:,} rows{trained}"]
        lines += [f"  {warning}"] if (warning := self.warning()) else []
        for name, count in self.sources.items():
            of_epoch = self.epoch.get(name, count)
            if len(self.sources) > 1 or of_epoch != count:
                rest = "; the rest fills no batch" if of_epoch < count else ""
                lines.append(f"  {count:,} from {name}, {of_epoch:,} in the first epoch{rest}")
        cut = {f"responses cut, {self.answerless:,} of them before the answer": self.cut} if self.cut else {}
        control = {"with control tokens, read as text": self.control_tokens}
        for reason, noted in {**self.dropped, **cut, **(control if self.control_tokens.count else {})}.items():
            share = f" ({noted.count / self.read:.1%})" if noted.count else ""
            more = noted.count - len(noted.examples)
            lines += [f"  {noted.count:,}{share} {reason}", *(f"    {example}" for example in noted.examples)]
            lines += [f"    and {more:,} more"] if more and noted.examples else []
        if self.unused:
            lines.append(f"  columns that were not used: {listed(list(self.unused))}")
        if tokens := self.tokens():
            head = ["tokens", *(f"{p} %" for p in PERCENTILES[:-1]), "longest"]
            rows = ([part, *(f"{value:,}" for value in found.values())] for part, found in tokens.items())
            lines += [f"  {line}" for line in table([head, *rows]).split("\n")]
        if self.padding_share is not None:
            lines.append(f"  {self.padding_share:.1%} of the positions will be padding")
        return printable("\n".join(lines))

    def to_json(self) -> dict[str, Any]:
        """Report as plain values."""
        lengths = {part: dict(found) for part, found in self.lengths.items()}
        return asdict(self) | {"lengths": lengths, "whole": dict(self.whole)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Report":
        """Restore a report from `to_json`."""
        dropped = {reason: Noted(**noted) for reason, noted in saved["dropped"].items()}
        lengths = {part: _counter(found) for part, found in saved["lengths"].items()}
        cut, control = saved["cut"] and Noted(**saved["cut"]), Noted(**saved["control_tokens"])
        read = {"dropped": dropped, "cut": cut, "control_tokens": control, "lengths": lengths}
        return cls(**saved | read | {"whole": _counter(saved["whole"])})


def _counter(saved: dict[str, int]) -> Counter[int]:
    return Counter({int(length): rows for length, rows in saved.items()})


class Prepared(NamedTuple):
    """Prepared rows and their report."""

    rows: TokenRows
    report: Report


def percentiles(lengths: Counter[int]) -> list[int]:
    """PERCENTILES of counted lengths; between two lengths, the larger."""
    values = sorted(lengths)
    through = np.cumsum([lengths[value] for value in values])
    ranks = np.ceil(np.array(PERCENTILES) / 100 * (through[-1] - 1))
    return [values[place] for place in np.searchsorted(through, ranks, side="right")]


def save(reports: list[Report], directory: Path, extend: bool = False) -> None:
    """Write data_report.json.

    Args:
        extend: keep the other reports of an existing file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    contents = read_object(path) if extend and path.exists() else {}
    for report in reports:
        contents[report.name] = {**report.to_json(), "tokens": report.tokens()}
        del contents[report.name]["lengths"], contents[report.name]["whole"]  # summarised by `tokens`
    write_object(path, contents)
