"""evaluation.json: what a result depends on, its scores as a table, their intervals."""

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

from data.storage import first_line, read_object
from data.terminal import table

FILE = "evaluation.json"
FIELDS = ("scores", "origin", "judges", "versions", "device", "dtype", "ranks", "config", "answers")
ROWS = ("data.val_files", "data.columns", "data.on_bad_row", "data.subset")
SETTINGS = ("model", "sampling", "task", "seed", *ROWS)  # that an evaluation reads
READS = (*SETTINGS, "trainer.output_dir", "trainer.experiment_name")
# Columns of the table of scores, by field.
COLUMNS = {
    "not_ended": "not ended",
    "no_answer": "no answer",
    "nfe": "NFE",
    "tokens_per_forward": "tokens a forward",
    "tokens_per_second": "tokens/s",
}
COUNTS = ("questions", "skipped", "right", "exact_match", "interval")


def read_result(place: str) -> dict[str, Any]:
    """Read an evaluation.json, or that of a directory.

    Raises:
        ValueError: there is none, or it is another or a damaged file.
    """
    path = Path(place) / FILE if Path(place).is_dir() else Path(place)
    if not path.exists():
        raise ValueError(f"{path}: no such file; evaluate.py writes it into trainer.output_dir")
    record = read_object(path)
    if missing := [name for name in FIELDS if name not in record]:
        raise ValueError(f"{path}: it has no {', '.join(missing)}: not a result of evaluate.py, or of an older version")
    try:
        _check(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its parts do not belong together ({first_line(error)}): evaluate again") from error
    return record


def _check(record: Mapping[str, Any]) -> None:
    """Read a result as `launch.compare` does; a damaged one raises an error of any of several types."""
    depends = identity(record) | settings(record)
    for task, scores in record["scores"].items():
        score_table([((task,), scores)])
        rights = [answer["right"] for answer in record["answers"][task]]
        if (len(rights), sum(rights)) != (scores["questions"], scores["right"]):
            raise ValueError(f"{task} has {sum(rights)} right of {len(rights)} answers")
        if (rows := f"rows of {task}") not in depends:
            raise KeyError(rows)


def identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the digests, judges, versions and device of a result, by names for errors."""
    versions = {f"version of {name}": value for name, value in record["versions"].items()}
    judges = {f"judge of {name}": value for name, value in record["judges"].items()}
    return record["origin"] | judges | versions | {name: record[name] for name in ("device", "dtype")}


def settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a result that an evaluation reads, by dotted name."""
    values: dict[str, Any] = {}
    for group, content in record["config"].items():
        inner = {f"{group}.{name}": value for name, value in content.items()} if isinstance(content, dict) else {}
        values |= inner or {group: content}
    return {name: value for name, value in values.items() if {name, name.partition(".")[0]} & {*SETTINGS}}


def interval(right: float, questions: int, level: float = 0.95) -> list[float]:
    """Wilson's score interval of the share of right answers.

    Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    z, share = NormalDist().inv_cdf((1 + level) / 2), right / questions
    scale = 1 + z**2 / questions
    center = (share + z**2 / (2 * questions)) / scale
    half = z / scale * sqrt(share * (1 - share) / questions + z**2 / (4 * questions**2))
    return [max(0.0, center - half), min(1.0, center + half)]


def score_table(rows: Iterable[tuple[Sequence[str], Mapping[str, Any]]], heads: Sequence[str] = ("task",)) -> str:
    """Scores as a table.

    Args:
        rows: cells of the first columns, and scores of a task.
        heads: of the first columns.
    """
    rows = list(rows)
    own = [name for _, scores in rows for name in scores if name not in COLUMNS and name not in COUNTS]
    names = [*dict.fromkeys(own), *COLUMNS]
    lines = [[*heads, "right", "exact match", "95 % interval", *(COLUMNS.get(name, name) for name in names)]]
    for first, scores in rows:
        low, high = scores["interval"]
        right = f"{scores['right']} of {scores['questions']}"
        cells = (_cell(name, scores.get(name)) for name in names)
        lines.append([*first, right, f"{scores['exact_match']:.1%}", f"{low:.1%} to {high:.1%}", *cells])
    return table(lines)


def _cell(name: str, value: float | None) -> str | float | None:
    if value is None or name in ("nfe", "tokens_per_forward"):
        return value
    return f"{value:,.0f}" if name == "tokens_per_second" else f"{value:.1%}"
