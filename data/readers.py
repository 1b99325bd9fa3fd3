"""The rows of a file, each with the place it came from, and an account of those that cannot be used."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

MAX_LINE = 2**24  # bytes of a row; a longer line of a .jsonl file has lost its line ends
NAMED = 10


class PlacedRow(NamedTuple):
    """A row and where it stands, as `file:line`, for the messages about it."""

    row: dict[str, Any]
    place: str


class BadRows:
    """Rows that cannot be used: the first NAMED with their place and what is wrong, the others counted.

    Args:
        advice: what can be done about them.
    """

    def __init__(self, advice: str = ""):
        self.advice, self.count, self.named = advice, 0, []

    def add(self, problem: str | ValueError) -> None:
        """Note a problem, which begins with the row's place."""
        self.count += 1
        if self.count <= NAMED:
            self.named.append(str(problem))

    def forget(self) -> None:
        """Begin anew."""
        self.count, self.named = 0, []

    def refuse(self) -> None:
        """Raises:
        ValueError: there are any.
        """
        if self.count:
            end = "\n" if self.count > 1 else ". "
            raise ValueError(f"{self.text()}{self.advice and end + self.advice}")

    def text(self) -> str:
        """All that are named, each on its line."""
        if self.count == 1:
            return self.named[0]
        more = [f"and {self.count - NAMED} more"] if self.count > NAMED else []
        return "\n".join([f"{self.count} rows cannot be used:", *self.named, *more])


def read_jsonl(file: Path, bad: BadRows) -> Iterator[PlacedRow]:
    """Yield the readable rows of a file with a JSON object a line; the others go to `bad`."""
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_LINE):
            number += 1
            place = f"{file}:{number}"
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                bad.add(f"{place}: the line is longer than {MAX_LINE:,} bytes")
                _skip_line(lines)
            elif line.strip():
                yield from _parse(line, place, bad)


def _skip_line(lines: BinaryIO) -> None:
    while (rest := lines.readline(MAX_LINE)) and not rest.endswith(b"\n"):
        pass


def _parse(line: bytes, place: str, bad: BadRows) -> Iterator[PlacedRow]:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        bad.add(f"{place}: not JSON ({error.msg}, column {error.colno})")
        return
    except (ValueError, RecursionError) as error:
        bad.add(f"{place}: not JSON ({error})")
        return
    if isinstance(row, dict):
        yield PlacedRow(row, place)
    else:
        bad.add(f"{place}: a row is a JSON object, this is {type(row).__name__}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(twice(name for name, _ in pairs))
    return row


def twice(names: Iterable[str]) -> str:
    """Name those that come more than once."""
    return f"{listed([name for name, count in Counter(names).items() if count > 1])} given twice"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def read_json(file: Path, bad: BadRows) -> Iterator[PlacedRow]:
    """Yield the readable rows of a file with a list in JSON; the others go to `bad`.

    Raises:
        ValueError: it is something else, or cut short.
    """
    content, number = file.read_bytes(), 0
    try:
        text = content.decode(json.detect_encoding(content), errors="surrogateescape")
        for element in _elements(text):
            number += 1
            yield from _parse(element.encode(errors="surrogateescape"), f"{file}:{number}", bad)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a list of rows in JSON, from row {number + 1} on ({error})") from error


def _elements(text: str) -> Iterator[str]:
    """The elements of a JSON list, as they are written.

    Raises:
        ValueError: it is something else.
    """
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    at = space.match(text).end()
    if text[at : at + 1] != "[":
        raise ValueError("it does not begin with [; is it .jsonl?")
    at = space.match(text, at + 1).end()
    while text[at : at + 1] != "]":
        _, end = decode(text, at)
        yield text[at:end]
        at = space.match(text, end).end()
        if text[at : at + 1] == ",":
            at = space.match(text, at + 1).end()
        elif text[at : at + 1] != "]":
            raise ValueError(f"expected , or ] at character {at}")
    if text[at + 1 :].strip():
        raise ValueError(f"something follows the list, at character {at + 1}")
