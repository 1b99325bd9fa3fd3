"""The table, page and picture of launch.compare_sampling."""

import csv
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

from data.storage import whole_file
from data.terminal import printable, table
from launch.experiments.page import PAGE, markdown, write_region
from launch.pareto import AXES, Point, draw, front
from launch.results import interval
from sampling import SamplingConfig

DIGITS = {"tokens_per_second": 0, "nfe": 1}  # after the point


@dataclass
class Combination:
    """A combination of settings, and its result."""

    values: tuple[str, ...]  # of the varied settings
    configs: list[SamplingConfig] = field(default_factory=list)  # one for each seed
    error: str | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)  # one for each seed, see `compare_sampling.measure`

    @property
    def point(self) -> Point:
        """The mean of its runs. The interval is that of one run, since all have the same questions."""
        questions, accuracy = self.runs[0]["questions"], mean(run["right"] / run["questions"] for run in self.runs)
        speed = sum(run["tokens"] for run in self.runs) / sum(run["seconds"] for run in self.runs)
        nfe = mean(run["nfe"] for run in self.runs)
        return Point(self.values, accuracy, interval(accuracy * questions, questions), speed, nfe)


def rows_of(combinations: Sequence[Combination], names: Sequence[str]) -> list[dict[str, Any]]:
    """A row of the table for each combination."""
    points = [each.point for each in combinations if not each.error]
    fronts = {axis: front(points, axis) for axis in AXES}
    rows = []
    for each in combinations:
        row = dict(zip(names, each.values, strict=True))
        if not each.error:
            low, high = each.point.interval
            row |= {
                "accuracy": each.point.accuracy,
                "low": low,
                "high": high,
                "tokens_per_second": each.point.tokens_per_second,
                "nfe": each.point.nfe,
                "tokens_per_forward": mean(run["tokens_per_forward"] for run in each.runs),
                "seeds": len(each.runs),
                "front": ", ".join(axis for axis, best in fronts.items() if each.point in best),
            }
        rows.append(row | {"error": each.error})
    return rows


def cells(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[list[str]]:
    """Texts of the table, the head first."""
    lines = [[*names, "accuracy", "95 % interval", "tokens/s", "nfe", "tokens a forward", "on the front of"]]
    for row in rows:
        texts = ["failed", *[""] * 5]
        if not row["error"]:
            texts = [
                f"{row['accuracy']:.1%}",
                f"{row['low']:.1%} to {row['high']:.1%}",
                *(f"{row[axis]:,.{digits}f}" for axis, digits in DIGITS.items()),
                f"{row['tokens_per_forward']:.2f}",
                row["front"].replace("tokens_per_second", "tokens/s"),
            ]
        lines.append([*(row[name] for name in names), *texts])
    return lines


def front_lines(points: Sequence[Point]) -> list[str]:
    """A line on each front."""
    return [
        f"Front of accuracy and {AXES[axis]}: "
        + " · ".join(
            f"{', '.join(each.values) or 'the only one'} ({each.accuracy:.1%}, {getattr(each, axis):,.{DIGITS[axis]}f})"
            for each in front(points, axis)
        )
        for axis in AXES
    ]


def report(
    combinations: Sequence[Combination],
    names: Sequence[str],
    origin: dict[str, Any],
    directory: Path,
    arguments: Sequence[str],
    region: str | None = None,
) -> None:
    """Print the table and the fronts; write them as CSV, Markdown and PNG.

    Args:
        names: of the varied settings.
        origin: what all results have in common.
        arguments: of the command.
        region: of launch/experiments/README.md, to be written too.
    """
    rows, points = rows_of(combinations, names), [each.point for each in combinations if not each.error]
    lines, failed = cells(rows, names), [each for each in combinations if each.error]
    errors = [f"failed: {', '.join(each.values)}: {each.error}" for each in failed]
    task = origin["task.name"]
    title = f"{origin['model.path']} on {task}, {origin[f'rows of {task}'].split()[0]} questions"
    summary = front_lines(points) if points else []
    print(printable("\n".join([table(lines), "", *summary, *errors])))
    with whole_file(directory / "results.csv") as file:
        writer = csv.DictWriter(file, list(max(rows, key=len)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    picture = None
    if points and find_spec("matplotlib") is not None:
        picture = draw(points, names, title)
    elif points:
        print("comparison.png needs matplotlib: pip install 'diffllm[plot]'", file=sys.stderr)
    command = f"`{shlex.join(['python', '-m', 'launch.compare_sampling', *arguments])}`"
    shared = [f"{name}: {value}" for name, value in {**origin, **shared_settings(combinations)}.items()]
    text = "\n\n".join([command, "; ".join(shared), markdown(lines), *summary, *errors])
    shown = "![accuracy against speed and forwards](comparison.png)" if picture else ""
    with whole_file(directory / "comparison.md") as file:
        file.write(f"# {title}\n\n{text}\n\n{shown}\n")
    if picture:
        with whole_file(directory / "comparison.png", "wb") as file:
            file.write(picture)
    if region:
        write_region(region, text, picture, "png", PAGE)
    print(printable(f"also in {directory}, as JSON, CSV, Markdown{' and PNG' if picture else ''}"))


def shared_settings(combinations: Sequence[Combination]) -> dict[str, Any]:
    """Settings of sampling that all combinations have, and that are not the defaults."""
    configs = [asdict(config) for each in combinations for config in each.configs]
    return {
        f"sampling.{name}": value
        for name, value in configs[0].items()
        if value != getattr(SamplingConfig(), name) and all(config[name] == value for config in configs)
    }
