"""Metrics of finished or running runs: read, grouped by their settings, and averaged over seeds."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from data.storage import read_records
from data.terminal import printable
from trainer.metrics import SETTINGS_FILE, check_steps

POINTS = 200  # of a curve; each is the mean of the steps around it
NAMED, LONG = 4, 40  # settings in a label; characters of a value in it
# Runs that differ in these alone are repetitions: the seed, names and places, and what is shown of a run.
REPEATED = (
    *("seed", "trainer.project_name", "trainer.experiment_name", "trainer.output_dir", "trainer.resume"),
    *("trainer.push_to_hub", "trainer.logger", "trainer.progress"),
)


class Run(NamedTuple):
    """A run that is drawn."""

    directory: Path
    settings: dict[str, Any] | None  # by dotted name; None for a run without the file
    points: dict[str, tuple[np.ndarray, np.ndarray]]  # steps and finite values [N] of each metric


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    label: str
    settings: dict[str, str]  # those that differ between the groups
    runs: list[Run]


class Band(NamedTuple):
    """A metric over the runs of a group: arrays [N]."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def find_runs(directory: Path) -> list[Path]:
    """The directory, if it is that of a run, else the runs in it, such as the jobs of a sweep.

    Raises:
        ValueError: no metrics.jsonl is there.
    """
    if (directory / "metrics.jsonl").is_file():
        return [directory]
    if not (found := sorted(file.parent for file in directory.glob("*/metrics.jsonl"))):
        raise ValueError(
            f"{directory}: no metrics.jsonl in it; name the directory of a run, such as outputs/quickstart"
        )
    return found


def read_run(directory: Path) -> Run:
    """Read metrics and settings of a run.

    Raises:
        ValueError: a line or the settings are damaged, or no metric has a number.
    """
    path, points = directory / "metrics.jsonl", {}
    for record in check_steps(path, read_records(path).objects):
        if _is_number(step := record.pop("step")):
            for name, value in record.items():
                if _is_number(value):
                    points.setdefault(name, []).append((step, value))
    if not points:
        raise ValueError(f"{path}: no metric with a number, nothing to draw")
    arrays = {name: tuple(np.array(pairs, dtype=float).T) for name, pairs in points.items()}
    return Run(directory, _read_settings(directory / SETTINGS_FILE), arrays)


def _is_number(value: Any) -> bool:
    """Whether a value can be drawn."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # nor NaN


def _read_settings(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        tree = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML ({' '.join(str(error).split())}); delete it") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: no settings; delete it")
    flat = {}
    for name, value in tree.items():
        inner = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {}
        flat |= inner or {str(name): value}
    return flat


def group(runs: Sequence[Run]) -> list[Group]:
    """Group runs that differ in their seed alone. A run without settings is a group of its own."""
    grouped: dict[Any, list[Run]] = {}
    for run in runs:
        key = run.directory if run.settings is None else json.dumps(_compared(run), sort_keys=True, default=str)
        grouped.setdefault(key, []).append(run)
    known = [_compared(members[0]) for members in grouped.values() if members[0].settings is not None]
    names = dict.fromkeys(name for settings in known for name in settings)
    axes = [name for name in names if any(settings.get(name) != known[0].get(name) for settings in known)]
    found = []
    for members in grouped.values():
        settings = members[0].settings
        values = {} if settings is None else {axis: _text(settings.get(axis)) for axis in axes}
        found.append(Group(_label(values) or str(members[0].directory), values, members))
    labels = [each.label for each in found]
    return [
        each._replace(label=str(each.runs[0].directory)) if labels.count(each.label) > 1 else each for each in found
    ]


def _compared(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.settings.items() if name not in REPEATED}


def _text(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value, default=str))


def _label(values: Mapping[str, str]) -> str:
    parts = [f"{name}={value if len(value) <= LONG else f'{value[:LONG]}…'}" for name, value in values.items()]
    return " ".join([*parts[:NAMED], *([f"and {len(parts) - NAMED} more"] if len(parts) > NAMED else [])])


def band(runs: Sequence[Run], metric: str) -> Band | None:
    """Mean, lowest and highest value of a metric over runs; None if no run has it.

    If there are more than POINTS steps, each point is the mean of neighbouring ones, for each run by itself.
    """
    found = [run.points[metric] for run in runs if metric in run.points]
    if not found:
        return None
    steps = np.unique(np.concatenate([steps for steps, _ in found]))
    first = steps[:: math.ceil(len(steps) / POINTS)]  # step of each point

    def means(at: np.ndarray, values: np.ndarray) -> np.ndarray:
        places = np.searchsorted(first, at, side="right") - 1
        counts, sums = (np.bincount(places, weights, len(first)) for weights in (None, values))
        return np.divide(sums, counts, out=np.full(len(first), np.nan), where=counts > 0)

    curves = np.stack([means(*points) for points in found])
    return Band(means(steps, steps), np.nanmean(curves, 0), np.nanmin(curves, 0), np.nanmax(curves, 0))
