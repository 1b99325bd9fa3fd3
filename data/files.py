"""JSONL and parquet files into rows, each with the place it came from."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
from pyarrow import ArrowInvalid


class PlacedRow(NamedTuple):
    """A row and where it stands, as `file:line`, for the messages about it."""

    row: dict[str, Any]
    place: str


def read_rows(files: Iterable[str | Path]) -> list[PlacedRow]:
    """All rows of all files, in order.

    Raises:
        ValueError: a file is missing, empty, of another kind, or not readable at the line named.
    """
    rows: list[PlacedRow] = []
    for file in map(Path, files):
        if not file.is_file():
            raise ValueError(f"{file}: no such data file")
        if file.suffix not in _READERS:
            raise ValueError(f"{file}: data files end in {' or '.join(_READERS)}")
        of_file = list(_READERS[file.suffix](file))
        if not of_file:
            raise ValueError(f"{file}: the file has no rows")
        rows += of_file
    return rows


def _read_jsonl(file: Path) -> Iterator[PlacedRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{place}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: a row is a JSON object, this is {type(row).__name__}")
            yield PlacedRow(row, place)


def _read_parquet(file: Path) -> Iterator[PlacedRow]:
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: not a readable parquet file ({error})") from error
    for number, row in enumerate(rows, start=1):
        yield PlacedRow(row, f"{file}:{number}")


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
