"""Pareto fronts of accuracy against cost, and their picture."""

from collections import defaultdict
from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe and Ito's
MARKERS = "osD^vP*X"
AXES = {"tokens_per_second": "tokens a second", "nfe": "forwards an answer (nfe)"}
LOG_FROM = 4  # ratio of the largest x to the smallest
STEPS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1))  # directions in which a label is tried
DISTANCES = (7, 16, 28, 42, 58)  # from its point


class Point(NamedTuple):
    """A measured combination of settings."""

    values: tuple[str, ...]  # of the varied settings
    accuracy: float
    interval: Sequence[float]
    tokens_per_second: float
    nfe: float


def front(points: Sequence[Point], axis: str) -> list[Point]:
    """The points to which no other is equal or better in accuracy and cost and better in one; the fastest first.

    Args:
        axis: tokens_per_second, the more the better, or nfe, the fewer.
    """
    sign = 1 if axis == "tokens_per_second" else -1
    best, found = (-1.0, None), []
    for point in sorted(points, key=lambda each: (-sign * getattr(each, axis), -each.accuracy)):
        place = point.accuracy, getattr(point, axis)
        if point.accuracy > best[0] or place == best:
            best = place
            found.append(point)
    return found


def draw(points: Sequence[Point], names: Sequence[str], title: str) -> bytes:
    """Draw accuracy against speed and against forwards, with both fronts, as PNG.

    The first setting has colours, the second markers; labels on the front have all values.

    Args:
        names: of the varied settings.
    """
    from matplotlib import rc_context  # of the extra `plot`
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure, file = Figure(figsize=(12, 5.2), layout="constrained", dpi=150), BytesIO()
    FigureCanvasAgg(figure)
    with rc_context({"text.parse_math": False}):  # values may have dollar signs
        _draw(figure, points, names, title)
        figure.savefig(file, format="png")
    return file.getvalue()


def _draw(figure: Any, points: Sequence[Point], names: Sequence[str], title: str) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    colours, markers = (_styles(points, i, styles) for i, styles in enumerate((COLOURS, MARKERS)))
    for panel, axis in zip(panels, AXES, strict=True):
        best = front(points, axis)
        x, y = [getattr(each, axis) for each in best], [100 * each.accuracy for each in best]
        panel.plot(x, y, color="0.6", zorder=1)
        places = [(getattr(each, axis), 100 * each.accuracy) for each in points]
        for number, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
            colour = colours[_value(point, 0)]
            bounds = [100 * bound for bound in point.interval]
            panel.plot([x, x], bounds, color=colour, alpha=0.25, linewidth=1, zorder=2)
            face, marker = colour if point in best else "white", markers[_value(point, 1)]
            size = 42 * places[number:].count((x, y))  # around those of later points at the same place
            panel.scatter(x, y, s=size, marker=marker, facecolor=face, edgecolor=colour, linewidth=1.3, zorder=3)
        _scale(panel, [getattr(each, axis) for each in points])
        panel.set_xlabel(AXES[axis])
        panel.margins(x=0.1)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("right answers, %, with 95 % interval")
    figure.suptitle(title)
    figure.legend(handles=_legend(colours, markers, names), loc="outside lower center", ncols=5, frameon=False)
    figure.canvas.draw()  # fixes the places of the points
    for panel, axis in zip(panels, AXES, strict=True):
        _label(panel, axis, points, names)


def _value(point: Point, i: int) -> str:
    return point.values[i] if i < len(point.values) else ""


def _styles(points: Sequence[Point], i: int, styles: Sequence[str]) -> dict[str, str]:
    """A style for each value of a setting; they begin again if there are too few."""
    values = dict.fromkeys(_value(point, i) for point in points)
    return {value: styles[number % len(styles)] for number, value in enumerate(values)}


def _legend(colours: dict[str, str], markers: dict[str, str], names: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    def entry(label: str, **style: Any) -> Line2D:
        return Line2D([], [], linestyle="", **{"marker": "o", "color": "0.4", "markersize": 6} | style, label=label)

    front = Line2D([], [], color="0.6", marker="o", markerfacecolor="0.4", markeredgecolor="0.4", label="Pareto front")
    entries = [front, entry("others", markerfacecolor="white")]
    if names:
        entries += [entry(f"{names[0]}={value}", color=colour) for value, colour in colours.items()]
    if len(names) > 1:
        entries += [entry(f"{names[1]}={value}", marker=marker) for value, marker in markers.items()]
    return entries


def _scale(panel: Any, values: Sequence[float]) -> None:
    """Choose a logarithmic axis for values of several sizes. Write numbers in full."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if 0 < LOG_FROM * min(values) < max(values):
        ratio = max(values) / min(values)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if ratio < 30 else (1, 2, 5)))
        panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _label(panel: Any, axis: str, points: Sequence[Point], names: Sequence[str]) -> None:
    """Label the front's points, each at the nearest place where it covers no point and no other label.

    Settings that the legend leaves out have their names.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    places = [(getattr(each, axis), 100 * each.accuracy) for each in points]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in panel.transData.transform(places)]
    renderer = panel.figure.canvas.get_renderer()
    frame, labels = panel.get_window_extent(), defaultdict(list)
    for point in front(points, axis):
        others = (f"{name}={value}" for name, value in zip(names[2:], point.values[2:], strict=True))
        labels[getattr(point, axis), 100 * point.accuracy].append(", ".join([*point.values[:2], *others]))
    for place, texts in labels.items():
        more = [f"and {len(texts) - 2} more"] if len(texts) > 3 else []
        text = "\n".join([*texts[:2], *(more or texts[2:])])
        for x, y in ((distance * x, distance * y) for distance in DISTANCES for x, y in STEPS):
            label = panel.annotate(
                text,
                place,
                (x, y),
                textcoords="offset points",
                ha={1: "left", -1: "right"}.get((x > 0) - (x < 0), "center"),
                va="bottom" if y > 0 else "top",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6},
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # that of an annotation has its arrow
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()  # the table has a label without a place
