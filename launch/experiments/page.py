"""Regions of a page that commands write, and the words that their results need."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.errors import nearest
from data.storage import whole_file
from trainer.distributed import device_name
from trainer.manifest import versions

PAGE = Path(__file__).with_name("README.md")


def write_region(name: str, text: str, page: Path) -> None:
    """Replace the text between `<!-- NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: the page has no such region.
    """
    before, after = split_at(name, page)
    with whole_file(page) as file:
        file.write(f"{before}\n{text.strip()}\n\n{after}")


def split_at(name: str, page: Path) -> tuple[str, str]:
    """A page up to the text of a region, and from there on.

    Raises:
        ValueError: the page has no such region.
    """
    content = page.read_text(encoding="utf-8")
    before, start, rest = content.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        names = [found for found in re.findall(r"<!-- (.+) -->", content) if found != "end"]
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
        device = f"{os.cpu_count()} cores of {device_name(torch.device('cpu'))}"
    return ", ".join([device, *(f"{name} {number}" for name, number in versions().items())])


def pyplot() -> Any:
    """The module of matplotlib, set to draw the same bytes from the same numbers.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'diffllm[plot]'") from error
    pyplot.rcParams["svg.hashsalt"] = "experiments"
    return pyplot


def svg(figure: Any) -> bytes:
    """A figure as SVG, without the date."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
