"""Draw the metrics of runs: `python -m trainer.plot outputs/A outputs/B`.

Runs are laid over each other. Those that differ in their seed alone are one line, the mean, within a band from the
lowest to the highest; a label has the settings that differ. Writes curves.png, and curves.html, which needs no other
file.
"""

import html
import io
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from data.storage import whole_file
from data.terminal import Parser, ending_in_one_line, printable
from trainer.curves import POINTS, Group, Run, band, find_runs, group, read_run

COLOURS = ("#3b82c4", "#e07b39", "#2f9e6e", "#c2569b", "#8a7bd1", "#b39b2d", "#5aa9c9", "#d14b4b")  # on white and black
INK, GRID = "#333334", "#cccccd"  # which the page replaces by its own
LINES = ("-", "--", "-.", ":")
LOG_FROM = 8  # ratio of the largest value to the smallest
WIDE = 2  # panels in a row
KINDS = {"train": "training", "val": "validation"}


class Panel(NamedTuple):
    """A picture of some metrics. Only those that runs have are drawn, and no empty panel."""

    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    factor: float = 1
    log: bool = False  # if the values differ by LOG_FROM


BY_T = "nll by t, validation"
BUCKET = re.compile(r"val/nll_t_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)")  # its metrics
PANELS = (
    Panel("loss", ("train/loss",), log=True),
    Panel("bound", ("train/elbo", "val/elbo", "train/nll", "val/nll"), "nats a response token", log=True),
    Panel(BY_T, (), "nats a masked token", log=True),
    Panel(
        "accuracy", ("train/masked_accuracy", "val/masked_accuracy", "train/accuracy", "val/accuracy"), "%", factor=100
    ),
    Panel("learning rate", ("train/lr",)),
    Panel("gradient norm", ("train/grad_norm",), log=True),
    Panel("speed", ("perf/tokens_per_second",), "tokens/s"),
    Panel("memory", ("perf/memory_gib",), "GiB, peak of rank 0"),
)


def draw(groups: Sequence[Group], panels: Sequence[Panel] = PANELS) -> Any:
    """A figure of matplotlib with those of the panels that have values.

    Raises:
        ValueError: none has.
    """
    from matplotlib import rc_context  # of the extra `plot`
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [(panel, names) for panel in panels if (names := _names(panel, groups))]
    if not drawn:
        raise ValueError(f"{groups[0].runs[0].directory}: none of its metrics has a panel")
    rows = -(-len(drawn) // WIDE)
    inks = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with rc_context({**inks, "grid.color": GRID, "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(11, 2.7 * rows + 0.3 * len(groups)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, WIDE, squeeze=False).flat)
        for plot, (panel, names) in zip(axes, drawn, strict=False):
            _draw(plot, panel, names, groups)
            plot.set_xlim(_limits(groups))
        for plot in axes[len(drawn) :]:
            plot.remove()
        handles = [figure.axes[0].plot([], color=_colour(i), label=_caption(each))[0] for i, each in enumerate(groups)]
        figure.legend(handles=handles, loc="outside upper center", frameon=False, ncols=1)
    return figure


def _limits(groups: Sequence[Group]) -> tuple[float, float]:
    """The first and the last step of all runs, with a margin."""
    steps = [at for each in groups for run in each.runs for at, _ in run.points.values()]
    first, last = min(at[0] for at in steps), max(at[-1] for at in steps)
    margin = 0.02 * (last - first) or 1
    return first - margin, last + margin


def _names(panel: Panel, groups: Sequence[Group]) -> list[str]:
    """The metrics of a panel that runs have."""
    known = {name for each in groups for run in each.runs for name in run.points}
    if panel.title == BY_T:
        return sorted(filter(BUCKET.fullmatch, known), key=lambda name: float(BUCKET.fullmatch(name)[1]))
    return [name for name in panel.metrics if name in known]


def _draw(plot: Any, panel: Panel, names: Sequence[str], groups: Sequence[Group]) -> None:
    by_t = panel.title == BY_T
    by_colour = by_t and len(groups) == 1
    low, high = float("inf"), 0.0
    for i, each in enumerate(groups):
        for j, name in enumerate(names):
            if (found := band(each.runs, name)) is None:
                continue
            colour = _colour(j if by_colour else i)
            mean, *limits = (panel.factor * values for values in found[1:])
            plot.plot(found.steps, mean, color=colour, **_style(name, j if by_t and not by_colour else 0))
            if len(each.runs) > 1:
                plot.fill_between(found.steps, *limits, color=colour, alpha=0.2, linewidth=0)
            low, high = min(low, mean.min()), max(high, mean.max())
    plot.set_title(panel.title, loc="left", fontweight="bold", fontsize=10)
    plot.set(xlabel="step", ylabel=panel.unit)
    plot.spines[["top", "right"]].set_visible(False)
    plot.grid(linewidth=0.6)
    if panel.log and 0 < LOG_FROM * low < high:
        _logarithmic(plot)
    else:
        plot.yaxis.set_major_formatter("{x:,g}")
    if len(names) > 1:
        _explain(plot, names, by_colour)


def _logarithmic(plot: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    plot.set_yscale("log")
    plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plot.yaxis.set_minor_locator(NullLocator())
    plot.yaxis.set_major_formatter("{x:g}")


def _explain(plot: Any, names: Sequence[str], by_colour: bool) -> None:
    """Say which line of a colour is which metric."""
    from matplotlib.lines import Line2D

    handles = {}
    for j, name in enumerate(names):
        bucket = BUCKET.fullmatch(name)
        label = f"t from {bucket[1]} to {bucket[2]}" if bucket else KINDS[name.partition("/")[0]]
        style = _style(name, j if bucket and not by_colour else 0)
        handles[label] = Line2D([], [], color=_colour(j) if by_colour else INK, label=label, **style)
    plot.legend(handles=[*handles.values()], frameon=False, fontsize=8)


def _style(metric: str, line: int) -> dict[str, Any]:
    """Dots at validations; thin lines for the steps."""
    if metric.startswith("val/"):
        return {"linestyle": LINES[line % len(LINES)], "linewidth": 1.4, "marker": "o", "markersize": 2.5}
    return {"linewidth": 1, "alpha": 0.75}


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _caption(each: Group) -> str:
    return each.label if len(each.runs) == 1 else f"{each.label} ({len(each.runs)} runs)"


def png(figure: Any) -> bytes:
    """A figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, facecolor="white")
    return file.getvalue()


def svg(figure: Any) -> str:
    """A figure as an SVG element, whose texts and grid follow the browser's dark or light."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": "curves", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    head, end, rest = file.getvalue().partition("<defs>")
    style = f"<style>{COLOUR_SCHEMES}</style>"
    element = head[head.index("<svg") :] + style + end + rest
    return element.replace(INK, "currentColor").replace(GRID, "var(--grid)")


def page(figure: Any, groups: Sequence[Group]) -> str:
    """A page with a figure, which sets the colours, and a table of the runs. It needs no other files."""
    return PAGE.format(svg=svg(figure), points=POINTS, table=_table(groups))


COLOUR_SCHEMES = """
:root { color-scheme: light dark; color: #222; --grid: #ddd; --paper: #fff }
@media (prefers-color-scheme: dark) { :root { color: #ddd; --grid: #3a3a3a; --paper: #161616 } }
"""
PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Training</title>
<style>
body {{ background: var(--paper); font: 14px/1.4 sans-serif }}
body {{ max-width: 1100px; margin: 1em auto; padding: 0 1em }}
svg {{ width: 100%; min-width: 720px; height: auto }}
svg text {{ font-family: sans-serif !important }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ text-align: left; padding: .2em .8em .2em 0; border-bottom: 1px solid var(--grid) }}
td {{ font-variant-numeric: tabular-nums }}
</style>
<div>
{svg}
</div>
<p>A point of a curve with more than {points} steps is the mean of the steps around it.</p>
<div>
{table}
</div>
</html>
"""


def _table(groups: Sequence[Group]) -> str:
    """A row for each run: its directory, the settings that differ, what it has reached."""
    axes = list(dict.fromkeys(name for each in groups for name in each.settings))
    head = ["directory", *axes, *_reached(groups[0].runs[0])]
    rows = [
        [str(run.directory), *(each.settings.get(axis, "") for axis in axes), *_reached(run).values()]
        for each in groups
        for run in each.runs
    ]
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _row(tag: str, texts: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(text)}</{tag}>' for text in texts)}</tr>"


def _reached(run: Run) -> dict[str, str]:
    """Seed, steps, last loss, lowest bound and its step."""
    _, losses = run.points.get("train/loss", ([], []))
    at, bounds = next((run.points[name] for name in ("val/elbo", "val/nll") if name in run.points), ([], []))
    lowest = min(zip(bounds, at, strict=True), default=None)
    return {
        "seed": str((run.settings or {}).get("seed", "")),
        "steps": f"{max(steps[-1] for steps, _ in run.points.values()):,.0f}",
        "last train/loss": f"{losses[-1]:.4f}" if len(losses) else "",
        "lowest bound": f"{lowest[0]:.4f}" if lowest else "",
        "at step": f"{lowest[1]:,.0f}" if lowest else "",
    }


def main(arguments: list[str]) -> None:
    parser = Parser("trainer.plot", __doc__)
    parser.add_argument("directory", type=Path, nargs="+", help="of a run, or of several, such as multirun/TIME")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for curves.png and curves.html; default: the first")
    with ending_in_one_line():
        options = parser.parse_args(arguments)
        if find_spec("matplotlib") is None:
            raise ValueError("pictures need matplotlib: pip install 'diffllm[plot]'")
        places = dict.fromkeys(place for directory in options.directory for place in find_runs(directory))
        groups = group([read_run(place) for place in places])
        figure, output = draw(groups), options.output or options.directory[0]
        output.mkdir(parents=True, exist_ok=True)
        files = {"curves.png": png(figure), "curves.html": page(figure, groups).encode()}
        for name, content in files.items():
            with whole_file(output / name, "wb") as file:
                file.write(content)
        runs = "1 run" if len(places) == 1 else f"{len(places)} runs"
        print(printable(f"{runs}: {output / 'curves.png'}, {output / 'curves.html'}"))


if __name__ == "__main__":
    main(sys.argv[1:])
