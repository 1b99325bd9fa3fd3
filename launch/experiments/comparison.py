"""Compare the settings that a sweep varied: means over seeds, the best settings, and their margin over the next."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from data.errors import nearest
from launch.experiments.estimates import Estimate, estimate
from launch.experiments.page import markdown, pyplot, svg

Row = dict[str, Any]  # of launch.sweep.results

SHARES = ("exact_match", "accuracy", "masked_accuracy")  # shown in percent; also of a task or validation
HIGHER = (*SHARES, "tokens_per_forward", "tokens_per_second")  # is better
SEEDS = ("seed", "sampling.seed")
WHOLE = ("tokens_per_second", "tokens", "parameters", "seconds")  # shown as whole numbers
SHOWN = ("exact_match", "nfe", *WHOLE)  # beside the metric and the validation's


@dataclass(frozen=True)
class Comparison:
    """Finished jobs of a sweep by their varied settings.

    Attributes:
        axes: names of the varied settings, without the seed.
        metric: judges the settings.
        groups: jobs by the values of the axes, one a seed.
    """

    axes: list[str]
    metric: str
    groups: dict[tuple[str, ...], list[Row]]

    @property
    def higher(self) -> bool:
        """Whether a higher metric is better."""
        return self.metric.rpartition("/")[2] in HIGHER

    def estimates(self, metric: str) -> dict[tuple[str, ...], Estimate | None]:
        """Mean of a metric over the seeds, None where no job has it."""
        found = {key: [row.get(metric) for row in rows] for key, rows in self.groups.items()}
        known = {key: [value for value in values if value is not None] for key, values in found.items()}
        return {key: estimate(values) if values else None for key, values in known.items()}

    def ranking(self) -> list[tuple[str, ...]]:
        """Settings from the best to the worst."""
        found = {key: value.mean for key, value in self.estimates(self.metric).items() if value is not None}
        return sorted(found, key=found.__getitem__, reverse=self.higher)

    def label(self, key: Sequence[str]) -> str:
        """Settings as they are typed."""
        return " ".join(f"{axis}={value}" for axis, value in zip(self.axes, key, strict=True))

    def margin(self, better: tuple[str, ...], worse: tuple[str, ...]) -> Estimate | None:
        """Mean difference of two settings over the seeds that both have, None without any."""
        by_seed = [
            {_seed(row): row[self.metric] for row in self.groups[key] if row.get(self.metric) is not None}
            for key in (better, worse)
        ]
        pairs = [(by_seed[0][seed], by_seed[1][seed]) for seed in by_seed[0] if seed in by_seed[1]]
        sign = 1 if self.higher else -1
        return estimate([sign * (first - second) for first, second in pairs]) if pairs else None


def compare(rows: Sequence[Row], metric: str | None = None) -> Comparison:
    """Compare the jobs of `launch.sweep.results` that did not fail.

    Args:
        metric: by default exact_match where all jobs were scored, else the first validation metric, else train/loss.

    Raises:
        ValueError: every job failed, none has the metric, or several tasks were scored and none is chosen.
    """
    done = [row for row in rows if not row["error"]]
    if not done:
        reason = f"job {rows[0]['job']}: {rows[0]['error']}" if rows else "no job.json is there"
        raise ValueError(f"none of {len(rows)} jobs has finished: {reason}")
    names = dict.fromkeys(name for row in done for name in [*row][1 : [*row].index("status")])
    axes = [name for name in names if name not in SEEDS]
    keyed = [(tuple(row.get(axis, "default") for axis in axes), row) for row in done]
    order = list(dict.fromkeys(key for key, _ in keyed))
    grouped = groupby(sorted(keyed, key=lambda pair: order.index(pair[0])), key=lambda pair: pair[0])
    metric = metric or _metric(done)
    measured = [name for row in done for name in [*row][[*row].index("error") + 1 :] if row[name] is not None]
    if metric not in measured:
        raise ValueError(f"--metric {metric}: no job has it; {nearest(metric, [*dict.fromkeys(measured)])}")
    return Comparison(axes, metric, {key: [row for _, row in pairs] for key, pairs in grouped})


def validated(row: Row) -> str | None:
    """Name of a job's first validation metric."""
    return next((name for name in row if name.startswith("val/")), None)


def _metric(rows: Sequence[Row]) -> str:
    if all("exact_match" in row for row in rows):
        return "exact_match"
    if scored := dict.fromkeys(name for row in rows for name in row if name.endswith("/exact_match")):
        raise ValueError(f"several tasks were scored: choose one by --metric {' or --metric '.join(scored)}")
    return validated(rows[0]) or "train/loss"


def table(comparison: Comparison) -> str:
    """One line for each setting: number of seeds, and means with their intervals."""
    rows = [row for group in comparison.groups.values() for row in group]
    shown = dict.fromkeys([comparison.metric, *filter(None, map(validated, rows)), *SHOWN])
    names = [name for name in shown if any(row.get(name) is not None for row in rows)]
    columns = {name: comparison.estimates(name) for name in names}
    head = [*comparison.axes, "seeds", *names]
    lines = [
        [*key, len(group), *(found[key] and _text(name, found[key]) for name, found in columns.items())]
        for key, group in comparison.groups.items()
    ]
    return markdown([head, *lines])


def _text(metric: str, value: Estimate, unit: str = " %") -> str:
    """A value of a metric.

    Args:
        unit: of a share.
    """
    if _is_share(metric):
        return value.percent() + unit
    return f"{value.mean:,.0f}" if metric in WHOLE else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_share(metric: str) -> bool:
    return metric.rpartition("/")[2] in SHARES


def verdict(comparison: Comparison) -> str:
    """Name the best settings, and say whether their margin over the next exceeds the spread over the seeds."""
    best, *others = comparison.ranking()
    value = comparison.estimates(comparison.metric)[best]
    line = f"{comparison.metric} {_text(comparison.metric, value)} over {_seeds(value.count)}."
    if not others:
        return line
    line = f"Best: `{comparison.label(best)}` with {line}"
    margin, other = comparison.margin(best, others[0]), comparison.label(others[0])
    if margin is None:
        return f"{line} The next, `{other}`, shares no seed with it."
    line = f"{line} Its margin over the next, `{other}`, is {_text(comparison.metric, margin, ' points')}"
    if not (margin.half or value.half):
        alike = "with one seed" if margin.half is None else f"with each of {_seeds(margin.count)}, which change nothing"
        setting = "seed" if any("train/loss" in row for row in comparison.groups[best]) else "sampling.seed"
        return f"{line} {alike}, so it may be chance: repeat with {setting}=0,1,2."
    clear = margin.mean > margin.half
    return f"{line}, {'more than' if clear else 'within'} the spread over {_seeds(margin.count)}."


def _seed(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in SEEDS)


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def draw(comparison: Comparison) -> bytes | None:
    """SVG of the metric over the most varied axis, in a colour for each value of the others. None for one setting.

    Points are joined where the axis has numbers.
    """
    keys, axes = list(comparison.groups), range(len(comparison.axes))
    if len(keys) == 1:
        return None
    values = [list(dict.fromkeys(key[i] for key in keys)) for i in axes]
    across = max(axes, key=lambda i: len(values[i]))
    found = comparison.estimates(comparison.metric)
    lines: dict[tuple[str, ...], list[tuple[int, Estimate]]] = {}
    for key in keys:
        place = values[across].index(key[across])
        line = tuple(f"{comparison.axes[i]}={key[i]}" for i in axes if i != across)
        if found[key] is not None:
            lines.setdefault(line, []).append((place, found[key]))
    from matplotlib.ticker import PercentFormatter

    figure, plot = pyplot().subplots(figsize=(7, 3.5), layout="constrained")
    joined = len(lines) > 1 and all(map(_is_number, values[across]))
    for line, points in lines.items():
        places, means = zip(*((place, point.mean) for place, point in points), strict=True)
        bars = [point.half or 0 for _, point in points]
        plot.errorbar(places, means, bars, fmt="o-" if joined else "o", capsize=4, label=" ".join(line) or None)
    plot.set_xticks(range(len(values[across])), values[across])
    if len(values[across]) > 4:
        plot.tick_params("x", rotation=15)
    plot.margins(x=0.1)
    plot.set(xlabel=comparison.axes[across], ylabel=comparison.metric)
    if _is_share(comparison.metric):
        plot.yaxis.set_major_formatter(PercentFormatter(1))
    if len(lines) > 1:
        plot.legend()
    return svg(figure)
