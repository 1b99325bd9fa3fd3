"""A recording as an animation (GIF), or as a picture of some of its steps (PNG), with the extra `plot`."""

import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sampling.recording import Cell, Commit, Recording
from sampling.render.page import title
from sampling.render.text import visible

# Colours, bounds and labels are those of canvas.css and canvas.js.
LEAST = (0.0, 0.5, 0.7, 0.9, 0.99)  # probabilities at which a colour begins
COLOURS = ("#f0a04b", "#f8cd96", "#f6ead2", "#e4edf6", "#cfe1f3")
TEXT, QUIET, MASK, HATCH, FRESH, PAGE = "#1b1f24", "#68707a", "#f1f3f5", "#c2c8d0", "#1f5fa8", "#ffffff"
END, UNUSED, BREAK = "∎", "·", "↵"
FRAMES, SECONDS, LAST = 60, 6.0, 2.5  # most of an animation; its length, and that of its last frame
PANELS, ACROSS = 6, 3  # most of a picture
SIZE = 20  # pixels of the font
LINE, PAD, GAP, MARGIN = 34, 4, 3, 28  # pixels: of a line, inside a cell, between cells, around the picture


@dataclass(frozen=True)
class Box:
    """Place and size of a cell in pixels, and its text."""

    x: int
    y: int
    width: int
    text: str
    height: int = LINE - 6


def png(recording: Recording) -> bytes:
    """Draw up to PANELS steps beside each other: the first, the last, and some between."""
    shown, file = _spread(len(recording.steps), PANELS), io.BytesIO()
    Picture(recording, columns=32, panels=len(shown)).draw(shown).save(file, "PNG", optimize=True)
    return file.getvalue()


def gif(recording: Recording) -> bytes:
    """Draw up to FRAMES steps one after the other, in SECONDS. The last frame stays longer."""
    shown, file = [0, *_spread(len(recording.steps), FRAMES - 1)], io.BytesIO()
    picture = Picture(recording, columns=56, panels=1)
    first, *others = (picture.draw([number]).quantize(64) for number in shown)
    each = 1000 * min(SECONDS / len(shown), 0.5)
    times = [*[each] * len(others), 1000 * LAST]
    first.save(file, "GIF", save_all=True, append_images=others, duration=times, loop=0, optimize=True)
    return file.getvalue()


def _spread(steps: int, most: int) -> list[int]:
    """Numbers of up to `most` steps of 1 … `steps`, with equal distances; [0] if no step was taken."""
    return np.unique(np.linspace(min(1, steps), steps, most).round().astype(int)).tolist()


class Picture:
    """Panels of steps, below the prompt and above the legend.

    Args:
        columns: characters of a line of the canvas.
        panels: steps in one picture.
    """

    def __init__(self, recording: Recording, columns: int, panels: int):
        self._recording, self._canvases = recording, [*recording.canvases()]
        self._font, self._small = _font(SIZE), _font(SIZE * 4 // 5)
        character = self._font.getlength("m")
        self._boxes = _layout(recording, self._canvases[-1], round(character), columns)
        self._across = min(ACROSS, panels)
        caption = round(self._small.getlength("step 1000 of 1000 · nfe 1000"))
        self._width = max([*(box.x + box.width for box in self._boxes), caption]) + MARGIN  # of a panel
        self._height = max([box.y for box in self._boxes], default=0) + 3 * LINE
        self._top = 2 * LINE + MARGIN // 2
        width, bottom = MARGIN + self._across * self._width, self._top + -(-panels // self._across) * self._height
        self.legend = _legend(self._small, width, bottom)
        size = (width, self.legend[-1][0].y + LINE + MARGIN // 2)
        self._hatch = _hatch(size)
        self._frame = self._empty(size, int((width - 2 * MARGIN) / character))

    def draw(self, shown: Sequence[int]) -> Any:
        """Draw the canvases after some steps, as an image of Pillow."""
        image, prompt_length = self._frame.copy(), self._recording.header.prompt_length
        for i, number in enumerate(shown):
            x, y = MARGIN + i % self._across * self._width, self._top + i // self._across * self._height
            nfe = self._recording.steps[number - 1].nfe if number else 0
            caption = f"step {number} of {len(self._recording.steps)} · nfe {nfe}"
            _pen(image).text((x, y), caption, QUIET, self._small)
            for box, cell in zip(self._boxes, self._canvases[number][prompt_length:], strict=True):
                fresh = cell.step is not None and cell.step == number
                self._cell(image, replace(box, x=x + box.x, y=y + LINE + box.y), cell, fresh)
        return image

    def _empty(self, size: tuple[int, int], columns: int) -> Any:
        """Draw all but the panels; `columns` characters of the prompt."""
        from PIL import Image

        image = Image.new("RGB", size, PAGE)
        prompt = visible(title(self._recording), keep="").strip()
        _pen(image).text((MARGIN, MARGIN), shortened(prompt, columns), TEXT, self._font)
        for box, cell, label in self.legend:
            self._cell(image, box, cell, fresh=cell.step is not None)
            _pen(image).text((box.x + box.width + 8, box.y + 1), label, QUIET, self._small)
        return image

    def _cell(self, image: Any, box: Box, cell: Cell, fresh: bool) -> None:
        """Draw a cell into its box.

        Args:
            fresh: committed by the step that is shown.
        """
        draw, area = _pen(image), (box.x, box.y, box.x + box.width, box.y + box.height)
        if cell.commit is not None:
            colour = COLOURS[sum(cell.commit.prob >= least for least in LEAST) - 1]
            draw.rounded_rectangle(area, 3, colour, FRESH if fresh else None, 2 if fresh else 0)
        elif cell.text is None and not cell.unused:
            image.paste(self._hatch.crop(area), area)
        if cell.again:
            for x in range(box.x + 2, area[2] - 3, 4):
                draw.rectangle((x, area[3] - 2, x + 1, area[3] - 1), QUIET)
        if cell.text is not None or cell.unused:
            colour = TEXT if cell.commit else QUIET
            draw.text((box.x + PAD, box.y + box.height // 2), box.text, colour, self._font, "lm")


def _pen(image: Any) -> Any:
    from PIL import ImageDraw

    return ImageDraw.Draw(image)


def _hatch(size: tuple[int, int]) -> Any:
    """The look of masked cells, as large as the picture."""
    from PIL import Image

    (width, height), image = size, Image.new("RGB", size, MASK)
    for x in range(-height, width, 6):
        _pen(image).line((x, height, x + height, 0), HATCH, 2)
    return image


def _layout(recording: Recording, final: Sequence[Cell], character: int, columns: int) -> list[Box]:
    """Boxes of the cells after the prompt, as wide as their final text, so that steps have the same lines."""
    boxes, x, y = [], 0, 0
    for cell in final[recording.header.prompt_length :]:
        raw = UNUSED if cell.unused else END if cell.id in recording.header.ends else cell.text or ""
        text = shortened(visible(raw.replace("\n", BREAK).replace("\t", "⇥"), keep=""), columns)
        width = max(1, sum(map(_columns, text))) * character + 2 * PAD
        if x and x + width > columns * (character + GAP):
            x, y = 0, y + LINE
        boxes.append(Box(x, y, width, text))
        x += width + GAP
        if "\n" in raw:
            x, y = 0, y + LINE
    return boxes


def _legend(font: Any, width: int, y: int) -> list[tuple[Box, Cell, str]]:
    """Boxes of the legend with a cell and a label each, in lines of a width from y on."""
    commits = [Cell("", commit=Commit(0, "", 0, least, None)) for least in LEAST]
    labels = [f"probability below {100 * LEAST[1]:g} %", *(f"from {100 * least:g} %" for least in LEAST[1:])]
    entries = [
        *zip(labels, commits, strict=True),
        ("masked", Cell()),
        ("committed by this step", replace(commits[-1], step=1)),
        ("was masked again", Cell("", again=1)),
        ("end of sequence", Cell(END)),
        ("behind the end", Cell(UNUSED)),
        ("line break", Cell(BREAK)),
    ]
    placed, x = [], MARGIN
    for label, cell in entries:
        taken = SIZE + 8 + round(font.getlength(label))
        if x > MARGIN and x + taken > width - MARGIN:
            x, y = MARGIN, y + LINE
        placed.append((Box(x, y, SIZE, cell.text or "", SIZE), cell, label))
        x += taken + MARGIN
    return placed


def _columns(character: str) -> int:
    """Columns that a character takes."""
    return 1 + (unicodedata.east_asian_width(character) in "WF")


def shortened(text: str, columns: int) -> str:
    """The text, or its start and … if it takes more columns."""
    kept = taken = 0
    for character in text:
        taken += _columns(character)
        if taken > columns:
            return text[:kept] + "…"
        kept += taken < columns
    return text


def _font(size: int) -> Any:
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")), size)
