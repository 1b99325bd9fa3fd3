"""A recording as an animation (GIF), or as a picture of some of its steps (PNG), with the extra `plot`."""

import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sampling.recording import Cell, Recording
from sampling.render.page import title
from sampling.render.text import visible

LEAST = (0.0, 0.5, 0.7, 0.9, 0.99)  # probabilities at which a colour begins
COLOURS = ("#f0a04b", "#f8cd96", "#f6ead2", "#e4edf6", "#cfe1f3")  # as in canvas.css
TEXT, QUIET, MASK, FRESH, PAGE = "#1b1f24", "#68707a", "#e6e9ed", "#1f5fa8", "#ffffff"
THIS_STEP = "this step"  # in the legend
FRAMES, SECONDS, LAST = 60, 6.0, 2.5  # most of an animation; its length, and that of its last frame
PANELS, ACROSS = 6, 3  # most of a picture
SIZE = 20  # pixels of the font
LINE, PAD, GAP, MARGIN = 34, 4, 3, 28  # pixels: of a line, inside a cell, between cells, around the picture


@dataclass(frozen=True)
class Box:
    """A cell's place in its panel, in pixels, and its text."""

    x: int
    y: int
    width: int
    text: str


def png(recording: Recording) -> bytes:
    """Draw up to PANELS steps beside each other: the first, the last, and some between."""
    canvases, file = [*recording.canvases()], io.BytesIO()
    shown = _spread(len(canvases) - 1, PANELS)
    _picture(recording, canvases, shown, columns=32).save(file, "PNG", optimize=True)
    return file.getvalue()


def gif(recording: Recording) -> bytes:
    """Draw up to FRAMES steps one after the other, in SECONDS. The last frame stays longer."""
    canvases, file = [*recording.canvases()], io.BytesIO()
    shown = [0, *_spread(len(canvases) - 1, FRAMES - 1)]
    first, *others = (_picture(recording, canvases, [number], columns=56).quantize(64) for number in shown)
    each = 1000 * min(SECONDS / len(shown), 0.5)
    times = [*[each] * len(others), 1000 * LAST]
    first.save(file, "GIF", save_all=True, append_images=others, duration=times, loop=0, optimize=True)
    return file.getvalue()


def _spread(steps: int, most: int) -> list[int]:
    """Numbers of up to `most` steps of 1 … `steps`, with equal distances; [0] if no step was taken."""
    return np.unique(np.linspace(min(1, steps), steps, most).round().astype(int)).tolist()


def _picture(recording: Recording, canvases: Sequence[Sequence[Cell]], shown: Sequence[int], columns: int) -> Any:
    """Panels of some steps, below the prompt and above the legend, as an image of Pillow."""
    from PIL import Image, ImageDraw

    font, small = _font(SIZE), _font(SIZE * 4 // 5)
    boxes = _layout(recording, canvases[-1], round(font.getlength("m")), columns)
    width = (
        max([*(box.x + box.width for box in boxes), round(small.getlength("step 1000 of 1000 · nfe 1000"))]) + MARGIN
    )
    height = max([box.y for box in boxes], default=0) + 3 * LINE
    across = min(ACROSS, len(shown))
    top, legend = 2 * LINE + MARGIN // 2, _legend(small)
    size = (
        MARGIN + max(across * width, legend[-1].x + legend[-1].width),
        top + -(-len(shown) // across) * height + LINE + MARGIN // 2,
    )
    image = Image.new("RGB", size, PAGE)
    draw = ImageDraw.Draw(image)
    room = int((size[0] - 2 * MARGIN) / font.getlength("m"))
    draw.text((MARGIN, MARGIN), _shortened(visible(title(recording), keep="").strip(), room), TEXT, font)
    for i, number in enumerate(shown):
        x, y = MARGIN + i % across * width, top + i // across * height
        nfe = recording.steps[number - 1].nfe if number else 0
        draw.text((x, y), f"step {number} of {len(recording.steps)} · nfe {nfe}", QUIET, small)
        for box, cell in zip(boxes, canvases[number][recording.header.prompt_length :], strict=True):
            _cell(draw, (x + box.x, y + LINE + box.y), box, cell, number, font)
    y = size[1] - LINE - MARGIN // 2
    for box, colour in zip(legend, (*COLOURS, MASK, None, None), strict=True):
        if colour or box.text == THIS_STEP:
            draw.rounded_rectangle((box.x, y, box.x + SIZE, y + SIZE), 3, colour, None if colour else FRESH, 2)
        else:
            draw.line((box.x, y + SIZE - 2, box.x + SIZE, y + SIZE - 2), QUIET, 2)
        draw.text((box.x + SIZE + 8, y + 1), box.text, QUIET, small)
    return image


def _cell(draw: Any, place: tuple[int, int], box: Box, cell: Cell, number: int, font: Any) -> None:
    """Draw a cell at a place of the image."""
    (x, y), fresh = place, cell.step is not None and cell.step == number
    area = (x, y, x + box.width, y + LINE - 6)
    if cell.commit is not None:
        colour = COLOURS[sum(cell.commit.prob >= least for least in LEAST) - 1]
        draw.rounded_rectangle(area, 3, colour, FRESH if fresh else None, 2 if fresh else 0)
    elif cell.text is None and not cell.unused:
        draw.rounded_rectangle(area, 3, MASK)
    if cell.again:
        draw.line((x + 2, area[3] - 1, area[2] - 2, area[3] - 1), QUIET, 2)
    if cell.text is not None or cell.unused:
        draw.text((x + PAD, y + 2), box.text, TEXT if cell.commit else QUIET, font)


def _layout(recording: Recording, final: Sequence[Cell], character: int, columns: int) -> list[Box]:
    """Boxes of the cells after the prompt, as wide as their final text, so that steps have the same lines."""
    boxes, x, y = [], 0, 0
    for cell in final[recording.header.prompt_length :]:
        raw = "·" if cell.unused else "∎" if cell.id in recording.header.ends else cell.text or ""
        text = _shortened(visible(raw.replace("\n", "↵").replace("\t", "⇥"), keep=""), columns)
        width = max(1, _columns(text)) * character + 2 * PAD
        if x and x + width > columns * (character + GAP):
            x, y = 0, y + LINE
        boxes.append(Box(x, y, width, text))
        x += width + GAP
        if "\n" in raw:
            x, y = 0, y + LINE
    return boxes


def _legend(font: Any) -> list[Box]:
    labels = [f"below {100 * LEAST[1]:g} %", *(f"from {100 * least:g} %" for least in LEAST[1:])]
    boxes, x = [], MARGIN
    for label in (*labels, "masked", THIS_STEP, "masked again"):
        boxes.append(Box(x, 0, SIZE + 8 + round(font.getlength(label)) + MARGIN, label))
        x += boxes[-1].width
    return boxes


def _columns(text: str) -> int:
    """Columns that a text takes; a wide character takes two."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def _shortened(text: str, columns: int) -> str:
    if _columns(text) <= columns:
        return text
    while _columns(text) >= columns:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> Any:
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")), size)
