"""Device and versions for captions, Markdown tables, SVG, regions of a page."""

import io
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from data.errors import nearest
from data.storage import whole_file
from trainer.distributed import device_name
from trainer.manifest import versions

PAGE = Path(__file__).with_name("README.md")


def write_region(name: str, text: str, picture: bytes | None, suffix: str, page: Path) -> None:
    """Replace the text between `<!-- NAME -->` and `<!-- end -->`, and the picture below it.

    Args:
        picture: content of NAME.SUFFIX beside the page, with `_` for spaces; None leaves the text alone.

    Raises:
        ValueError: the page has no such region.
    """
    before, after = split_at(name, page)
    if picture is not None:
        file = page.with_name(f"{name.replace(' ', '_')}.{suffix}")
        text = f"{text.strip()}\n\n![{name}]({file.name})"
        with whole_file(file, "wb") as content:
            content.write(picture)
    with whole_file(page) as content:
        content.write(f"{before}\n{text.strip()}\n\n{after}")


def split_at(name: str, page: Path) -> tuple[str, str]:
    """A page up to the text of a region, and from there on.

    Raises:
        ValueError: the page has no such region.
    """
    content = page.read_text(encoding="utf-8")
    names = [found for found in re.findall(r"<!-- (.+) -->", content) if found != "end"]
    before, start, rest = content.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end or name not in names:
        raise ValueError(f"{page}: no region {name}; {nearest(name, names)}. Add <!-- {name} -->, <!-- end -->")
    return before + start, end + after


def markdown(rows: Sequence[Sequence[object]]) -> str:
    """A table, the first row its head. None is an empty cell."""
    texts = [["" if cell is None else str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in texts]
    return "\n".join([lines[0], "|---" * len(texts[0]) + "|", *lines[1:]])


def circumstances() -> str:
    """The device and the versions that a result depends on."""
    if gpus := torch.cuda.device_count():
        device = f"{gpus} × {torch.cuda.get_device_name()}"
    else:
        threads = torch.get_num_threads()
        device = f"{threads} thread{'s' * (threads > 1)} on {device_name(torch.device('cpu'))}"
    return ", ".join([device, *(f"{name} {number}" for name, number in versions().items())])


def check_plot() -> None:
    """Refuse to summarise without the packages of the extra plot.

    Raises:
        ValueError: one is not installed.
    """
    if missing := [name for name in ("matplotlib", "scipy") if find_spec(name) is None]:
        raise ValueError(f"pictures and intervals need {' and '.join(missing)}: pip install 'diffllm[plot]'")


def pyplot() -> Any:
    """The module of matplotlib, set to draw the same bytes from the same numbers."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "experiments"
    return pyplot


def svg(figure: Any) -> bytes:
    """A figure as SVG, without the date."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
