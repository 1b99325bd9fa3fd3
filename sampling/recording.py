"""Recordings: what each step did to one canvas, as JSON lines with the text of each token.

The first line is a `Header`, the last one a `Result`, and each line between them a `Step`.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

FORMAT, VERSION = "diffllm recording", 1
LONGEST = 2**20  # tokens of a canvas


@dataclass(frozen=True)
class Piece:
    """Text of a token. A character of several tokens belongs to the first of them; the others have none."""

    position: int
    text: str


@dataclass(frozen=True)
class Given(Piece):
    """A token of the canvas before the first step."""

    id: int


@dataclass(frozen=True)
class Commit(Piece):
    """A token that a step committed."""

    id: int
    prob: float
    entropy: float | None  # nats; None if the settings do not rate by entropy


@dataclass(frozen=True, kw_only=True)
class Header:
    """The canvas before the first step, and its origin. All positions but those of `given` are masked."""

    format: str = FORMAT
    version: int = VERSION
    diffllm: str  # version
    model: str
    sampling: dict  # settings, the seed among them
    prompt: str | None
    template: str | None
    prompt_length: int  # tokens before the text that is shown
    length: int  # of the canvas
    masked: int
    ends: list[int]  # ids that end a response
    given: list[Given]


@dataclass(frozen=True)
class Step:
    """A step of the canvas, see `StepEvent`."""

    step: int
    nfe: int
    committed: list[Commit]
    remasked: list[int]  # positions masked again
    unused: list[int]  # positions behind the end, which nothing fills any more
    texts: list[Piece]  # new texts of earlier tokens: a character is whole now


@dataclass(frozen=True)
class Result:
    """The end of the sampling."""

    text: str
    nfe: int
    tokens: int  # up to and including the one that ends the response
    tokens_per_forward: float
    seconds: float


@dataclass(frozen=True)
class Cell:
    """A position after a step."""

    text: str | None = None  # None: masked, or unused
    id: int | None = None
    commit: Commit | None = None  # None: masked, unused or given
    step: int | None = None  # number of the event that committed it, from 1
    again: int = 0  # times that it was masked again
    unused: bool = False  # behind the end


@dataclass(frozen=True)
class Recording:
    """The sampling of one canvas."""

    header: Header
    steps: list[Step]
    result: Result

    def lines(self) -> Iterator[str]:
        """Yield the lines of the file."""
        for each in (self.header, *self.steps, self.result):
            yield json.dumps(asdict(each), allow_nan=False) + "\n"

    def canvases(self) -> Iterator[list[Cell]]:
        """Yield the canvas [L] before the first step, and after each.

        Raises:
            ValueError: a step contradicts the canvas before it.
        """
        header = self.header
        if not 0 <= header.length <= LONGEST:
            raise ValueError(f"a canvas of {header.length} tokens, where at most {LONGEST:,} can be")
        canvas = [Cell()] * header.length
        for given in header.given:
            canvas[_place(given.position, canvas)] = Cell(given.text, given.id)
        masked = sum(cell.text is None for cell in canvas)
        if masked != header.masked or not 0 <= header.prompt_length <= header.length:
            raise ValueError(f"the canvas has {masked} masks of {header.masked}")
        yield canvas
        for number, step in enumerate(self.steps, start=1):
            canvas = _after(step, number, canvas)
            yield canvas


def read(path: Path) -> Recording:
    """Read a recording.

    Raises:
        ValueError: not a recording, one of another version, cut short or damaged.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    lines = content.splitlines()
    first = _json(lines[0]) if lines else None
    if not isinstance(first, dict) or first.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is not a recording: sample.py prompt=… record=FILE.jsonl writes one")
    if first.get("version") != VERSION:
        raise ValueError(
            f"{str(path)!r}: a recording of version {first.get('version')!r} by diffllm {first.get('diffllm')!r}; "
            f"this diffllm reads version {VERSION}: record again, or render it with the other"
        )
    where = "line 1: "
    try:
        header, steps, result = _as(Header, first), [], None
        for number, line in enumerate(lines[1:], start=2):
            where, last = f"line {number}: ", number == len(lines)
            if last and not content.endswith(b"\n"):
                break
            record = _json(line)
            if last and isinstance(record, dict) and "seconds" in record:
                result = _as(Result, record)
            else:
                steps.append(_as(Step, record))
        if result is None:
            raise ValueError(f"cut short after {len(steps)} steps, before its result")
        where, recording = "", Recording(header, steps, result)  # the errors of steps name them
        for _ in recording.canvases():
            pass
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {where}{error}; record it again") from error
    return recording


def _after(step: Step, number: int, before: Sequence[Cell]) -> list[Cell]:
    """The canvas after a step."""
    canvas = list(before)
    for position in step.remasked:
        cell = canvas[_place(position, canvas)]
        if cell.commit is None:
            raise ValueError(f"step {number} masks position {position} again, which no step committed")
        canvas[position] = Cell(again=cell.again + 1)
    for commit in step.committed:
        cell = canvas[_place(commit.position, canvas)]
        if cell.text is not None or cell.unused or not 0 <= commit.prob <= 1:
            raise ValueError(f"step {number} cannot commit position {commit.position}")
        canvas[commit.position] = replace(cell, text=commit.text, id=commit.id, commit=commit, step=number)
    for position in step.unused:
        canvas[_place(position, canvas)] = Cell(unused=True)
    for piece in step.texts:
        canvas[_place(piece.position, canvas)] = replace(canvas[piece.position], text=piece.text)
    return canvas


def _place(position: int, canvas: Sequence[Cell]) -> int:
    if not 0 <= position < len(canvas):
        raise ValueError(f"position {position} is outside the canvas of {len(canvas)}")
    return position


def _json(line: bytes) -> Any:
    """A JSON value; None if it is none, or has numbers that JSON has not."""
    try:
        value = json.loads(line)
        json.dumps(value, allow_nan=False)
        return value
    except (ValueError, RecursionError):
        return None


def _as(kind: Any, value: Any) -> Any:
    """The JSON value as a dataclass, a list, or a plain value of this type.

    Raises:
        ValueError: it is of another type.
    """
    if isinstance(kind, UnionType):
        return None if value is None else _as(get_args(kind)[0], value)
    if is_dataclass(kind):
        hints = _hints(kind)
        if not isinstance(value, dict) or value.keys() != hints.keys():
            raise ValueError(f"damaged, no {kind.__name__.lower()} with {', '.join(hints)}")
        return kind(**{name: _as(hint, value[name]) for name, hint in hints.items()})
    if get_origin(kind) is list and isinstance(value, list):
        return [_as(get_args(kind)[0], each) for each in value]
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return value
    if kind is dict and type(value) is dict and not all(map(_is_setting, value.values())):
        raise ValueError("damaged, a setting is neither a plain value nor a list of them")
    if kind is not float and type(value) is kind:
        return value
    raise ValueError(f"damaged, {value!r:.40} is no {getattr(kind, '__name__', kind)}")


def _is_setting(value: Any) -> bool:
    parts = value if type(value) is list else [value]
    return all(part is None or type(part) in (bool, int, float, str) for part in parts)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
