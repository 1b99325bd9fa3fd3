"""Read the rows of .jsonl and .json files, each with its place."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data.errors import BadRows, twice

MAX_LINE = 2**24  # bytes of a row; a longer line of a .jsonl file has lost its line ends


class PlacedRow(NamedTuple):
    """A row, and its place as `file:line` for error messages."""

    row: dict[str, Any]
    place: str


def read_jsonl(file: Path, bad: BadRows) -> Iterator[PlacedRow]:
    """Yield the readable rows of a file with one JSON object per line; add the others to `bad`."""
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


def read_json(file: Path, bad: BadRows) -> Iterator[PlacedRow]:
    """Yield the readable rows of a file with a JSON list; add the others to `bad`.

    Raises:
        ValueError: the content is not a JSON list, or cut short.
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
    """Yield the text of each element of a JSON list.

    Raises:
        ValueError: the text is not a JSON list.
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
