"""Report on rows read, kept and dropped, and on their lengths, as text, JSON and picture."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np

from data.errors import BadRows, listed
from data.storage import read_object, whole_file, write_object
from data.terminal import printable, table
from data.token_rows import TokenRows

FILE = "data_report.json"
EXAMPLES = 3  # per reason
MAX_UNUSED = 1000  # columns
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

    def text(self) -> str:
        """Report as lines for the terminal."""
        trained = "" if self.trained is None else f" read, {self.trained:,} trained on"
        lines = [f"{self.name}: {self.kept:,} of {self.read:,} rows{trained}"]
        for name, count in self.sources.items():
            of_epoch = self.epoch.get(name, count)
            if len(self.sources) > 1 or of_epoch != count:
                lines.append(f"  {count:,} from {name}, {of_epoch:,} in the first epoch")
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
        return asdict(self) | {"lengths": {part: dict(found) for part, found in self.lengths.items()}}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Report":
        """Restore a report from `to_json`."""
        dropped = {reason: Noted(**noted) for reason, noted in saved["dropped"].items()}
        lengths = {
            part: Counter({int(length): rows for length, rows in found.items()})
            for part, found in saved["lengths"].items()
        }
        cut, control = saved["cut"] and Noted(**saved["cut"]), Noted(**saved["control_tokens"])
        return cls(**saved | {"dropped": dropped, "cut": cut, "control_tokens": control, "lengths": lengths})


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


def save(reports: list[Report], directory: Path, extend: bool = False) -> list[Path]:
    """Write data_report.json, and data_report.png if matplotlib (extra `plot`) is installed; return the files.

    Args:
        extend: keep the other reports of an existing JSON file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    contents = read_object(path) if extend and path.exists() else {}
    for report in reports:
        contents[report.name] = {**report.to_json(), "tokens": report.tokens()}
        del contents[report.name]["lengths"]  # summarised by `tokens`
    write_object(path, contents)
    return [path, *_draw(reports, path.with_suffix(".png"))]


def _draw(reports: list[Report], path: Path) -> list[Path]:
    if not reports:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    figure = Figure(figsize=(12, 4 * len(reports)), layout="constrained")
    for axes, report in zip(figure.subplots(len(reports), 2, squeeze=False), reports, strict=True):
        _draw_rows(axes, report)
    with whole_file(path, "wb") as file:
        figure.savefig(file, format="png")
    return [path]


def _draw_rows(axes: Any, report: Report) -> None:
    """Draw lengths on the left, row counts by outcome on the right."""
    tokens = report.tokens()
    bins = np.linspace(0, max((found["p100"] for found in tokens.values()), default=1), 50)
    for part in tokens:
        lengths = report.lengths[part]
        axes[0].stairs(*np.histogram(list(lengths), bins, weights=list(lengths.values())), label=part)
    axes[0].set(title=report.name, xlabel="tokens", ylabel="rows", yscale="log")
    axes[0].legend()
    counts = {"kept": report.kept} | ({"of them cut": report.cut.count} if report.cut else {})
    # matplotlib reads $ as the start of a formula
    counts |= {fill(reason, 40).replace("$", r"\$"): noted.count for reason, noted in report.dropped.items()}
    bars = axes[1].barh(list(counts), list(counts.values()))
    axes[1].bar_label(bars, fmt="{:,.0f}", padding=3)
    axes[1].set(title=f"of {report.read:,} read", xlabel="rows")
    axes[1].margins(x=0.15)
    axes[1].invert_yaxis()
