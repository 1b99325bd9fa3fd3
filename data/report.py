"""What became of the rows: read, kept, dropped and why, how long; as text, JSON and picture."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np

from data.readers import BadRows
from data.tokens import TokenRows

FILE = "data_report.json"
EXAMPLES = 3  # of each reason
PERCENTILES = (5, 50, 95, 99, 100)
PARTS = {"prompt": "prompt_lengths", "response": "response_lengths"}
COUNTED = {"thinking": "thinking_tokens", "answer": "answer_tokens"}


@dataclass
class Noted:
    """How many rows something happened to, and the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass
class Report:
    """An account of one set of rows."""

    name: str
    read: int = 0
    kept: int = 0
    dropped: dict[str, Noted] = field(default_factory=dict)  # by reason
    cut: Noted = field(default_factory=Noted)  # rows whose response lost its end
    sources: dict[str, int] = field(default_factory=dict)  # rows kept of each
    epoch: dict[str, int] = field(default_factory=dict)  # rows of each in the first epoch
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)  # percentiles of each part's length
    padding_share: float | None = None  # of the positions that will be forwarded

    def drop(self, reason: str, example: str) -> None:
        """Note that a row is left out."""
        self.dropped.setdefault(reason, Noted()).add(example)

    def add_bad(self, bad: BadRows) -> None:
        """Note the rows that cannot be used."""
        if bad.count:
            self.dropped["cannot be used"] = Noted(bad.count, bad.named)

    def leave(self, count: int, reason: str) -> None:
        """Note that so many rows are left out that are as good as the others."""
        self.dropped[reason] = Noted(count)

    def measure(self, rows: TokenRows) -> None:
        """Take the lengths of the rows that are kept."""
        self.kept, self.cut.count = len(rows), int(rows.cut.sum())
        if self.sources:
            counts = np.bincount(rows.column("source"), minlength=len(self.sources))
            self.sources = dict(zip(self.sources, counts.tolist(), strict=True))
        for part, lengths in lengths_of(rows).items():
            values = np.percentile(lengths, PERCENTILES, method="higher")
            self.tokens[part] = {f"p{p}": int(value) for p, value in zip(PERCENTILES, values, strict=True)}

    def text(self) -> str:
        """For the terminal."""
        lines = [f"{self.name} rows: {self.kept:,} of {self.read:,}"]
        for name, count in self.sources.items():
            of_epoch = self.epoch.get(name, count)
            if len(self.sources) > 1 or of_epoch != count:
                lines.append(f"  {count:,} from {name}, {of_epoch:,} in the first epoch")
        for reason, noted in [*self.dropped.items(), ("response cut", self.cut)]:
            if noted.count:
                share = f"{noted.count / self.read:.1%}"
                lines += [f"  {noted.count:,} ({share}) {reason}", *(f"    {example}" for example in noted.examples)]
        if self.tokens:
            lines.append("  " + " " * 10 + "".join(f"{f'{p} %':>8}" for p in PERCENTILES[:-1]) + f"{'longest':>9}")
            for part, found in self.tokens.items():
                *most, longest = found.values()
                lines.append(f"  {part:10}" + "".join(f"{value:8,}" for value in most) + f"{longest:9,} tokens")
        if self.padding_share is not None:
            lines.append(f"  {self.padding_share:.1%} of the positions will be padding")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Report":
        """Back from `to_json`."""
        dropped = {reason: Noted(**noted) for reason, noted in saved["dropped"].items()}
        return cls(**saved | {"dropped": dropped, "cut": Noted(**saved["cut"])})


class Prepared(NamedTuple):
    """Rows that are ready, and what became of the others."""

    rows: TokenRows
    report: Report


def lengths_of(rows: TokenRows) -> dict[str, np.ndarray]:
    """Tokens of each part of each row; thinking and answer of the last answer, where there is thinking."""
    lengths = {part: getattr(rows, name) for part, name in PARTS.items()}
    counts = {part: rows.column(name) for part, name in COUNTED.items()}
    return lengths | (counts if counts["thinking"].any() else {})


def save(prepared: dict[str, Prepared], directory: Path) -> list[Path]:
    """Write data_report.json, and data_report.png if matplotlib (extra `plot`) is installed; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    _write({name: report.to_json() for name, (_, report) in prepared.items()}, path)
    return [path, *_draw(prepared, path.with_suffix(".png"))]


def extend(name: str, report: Report, directory: Path) -> None:
    """Put one more report into data_report.json, beside those that are there."""
    path = directory / FILE
    before = json.loads(path.read_text()) if path.exists() else {}
    _write(before | {name: report.to_json()}, path)


def _write(reports: dict[str, Any], path: Path) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(reports, indent=2) + "\n")
    unfinished.replace(path)


def _draw(prepared: dict[str, Prepared], path: Path) -> list[Path]:
    if not prepared:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    figure = Figure(figsize=(12, 4 * len(prepared)))
    every = figure.subplots(len(prepared), 2, squeeze=False, gridspec_kw={"wspace": 0.6, "hspace": 0.4})
    for axes, (rows, report) in zip(every, prepared.values(), strict=True):
        _draw_rows(axes, rows, report)
    figure.savefig(path, bbox_inches="tight")
    return [path]


def _draw_rows(axes: Any, rows: TokenRows, report: Report) -> None:
    """Lengths on the left, what became of the rows on the right."""
    lengths = lengths_of(rows)
    bins = np.linspace(0, max(part.max() for part in lengths.values()), 50)
    for part, values in lengths.items():
        axes[0].stairs(*np.histogram(values, bins), label=part)
    axes[0].set(title=f"{report.name} rows", xlabel="tokens", ylabel="rows")
    axes[0].legend()
    counts = {"kept": report.kept, "of them cut": report.cut.count}
    # a dollar sign would begin a formula
    counts |= {fill(reason, 40).replace("$", r"\$"): noted.count for reason, noted in report.dropped.items()}
    bars = axes[1].barh(list(counts), list(counts.values()))
    axes[1].bar_label(bars, fmt="{:,.0f}", padding=3)
    axes[1].set(title=f"of {report.read:,} read", xlabel="rows")
    axes[1].margins(x=0.15)
    axes[1].invert_yaxis()
