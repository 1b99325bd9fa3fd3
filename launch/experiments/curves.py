"""Validations of a sweep's jobs over epochs: where each setting is best, and where it starts to overfit."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.storage import read_records
from launch.experiments.comparison import Comparison, Row, validated
from launch.experiments.estimates import estimate
from launch.experiments.page import markdown, pyplot, svg

Key = tuple[str, ...]  # values of the axes


class Curve(NamedTuple):
    """The validations of a job: arrays [N]."""

    epochs: np.ndarray
    values: np.ndarray  # of the first validation metric

    @property
    def lowest(self) -> int:
        """Index of the lowest value."""
        return int(self.values.argmin())


def curves(comparison: Comparison, jobs: Mapping[int | str, Path]) -> dict[Key, list[Curve]]:
    """The curves of all jobs by the values of the axes.

    Args:
        jobs: directories by `job` of their rows.

    Raises:
        ValueError: a job was not validated, or no validation of it is finite.
    """
    return {key: [_curve(row, jobs[row["job"]]) for row in rows] for key, rows in comparison.groups.items()}


def _curve(row: Row, job: Path) -> Curve:
    if (metric := validated(row)) is None:
        raise ValueError(f"{job}: has no validation; give validation rows and trainer.val_check_interval")
    records = read_records(job / "metrics.jsonl").objects
    points = [(each.get("train/epoch"), each.get(metric)) for each in records]
    if not (finite := [point for point in points if None not in point]):
        raise ValueError(f"{job / 'metrics.jsonl'}: no step has a finite {metric} and its train/epoch")
    return Curve(*np.array(finite).T)


def table(comparison: Comparison, found: Mapping[Key, list[Curve]]) -> str:
    """One line for each setting: its lowest value, the epoch of that, and the value at the end, over seeds."""
    head = [*comparison.axes, "seeds", "metric", "lowest", "its epoch", "at the end", "last epoch"]
    lines = []
    for key, each in found.items():
        metric = validated(comparison.groups[key][0])
        lowest = estimate([float(curve.values.min()) for curve in each])
        epoch = estimate([float(curve.epochs[curve.lowest]) for curve in each])
        end = estimate([float(curve.values[-1]) for curve in each])
        lines.append([*key, len(each), metric, lowest, epoch, end, f"{each[0].epochs[-1]:.4g}"])
    return markdown([head, *lines])


def verdict(comparison: Comparison, found: Mapping[Key, list[Curve]]) -> str:
    """Say for each setting after which epoch it overfits."""
    sentences = []
    for key, each in found.items():
        best = [float(curve.epochs[curve.lowest]) for curve in each]
        last = float(each[0].epochs[-1])
        if min(best) == last:
            where = f"does not overfit within {last:.4g} epochs"
        elif max(best) == last:
            where = f"overfits after {min(best):.4g} epochs or more, with some seeds not within {last:.4g}"
        else:
            span = " to ".join(dict.fromkeys(f"{epoch:.4g}" for epoch in (min(best), max(best))))
            where = f"overfits after {span} epochs"
        sentences.append(f"`{comparison.label(key)}` {where}.")
    return " ".join(sentences)


def draw(comparison: Comparison, found: Mapping[Key, list[Curve]]) -> bytes:
    """The mean curve of each setting, between the lowest and highest seed, as SVG. A dot marks its lowest value."""
    from matplotlib.ticker import NullFormatter

    figure, plot = pyplot().subplots(figsize=(7, 3.5), layout="constrained")
    for key, each in found.items():
        values = np.stack([curve.values for curve in each])
        mean, epochs = values.mean(0), each[0].epochs
        metric = validated(comparison.groups[key][0])
        [line] = plot.plot(epochs, mean, label=f"{comparison.label(key)}: {metric}")
        plot.fill_between(epochs, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
        plot.plot(epochs[mean.argmin()], mean.min(), "o", color=line.get_color())
    plot.set(xlabel="epoch", ylabel="nats a token", xscale="log", yscale="log")
    for axis in (plot.xaxis, plot.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}" if axis is plot.yaxis else NullFormatter())
    plot.legend()
    return svg(figure)
