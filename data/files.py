"""Files, folders and hub data sets into rows, each with the place it came from."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow.parquet
from pyarrow import ArrowException, RecordBatch

MAX_LINE = 2**24  # bytes of a row in a .jsonl file: what is longer has lost its line ends
ROWS_AT_ONCE = 1000  # of a parquet file
NAMED = 10
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::(\w+))?")  # owner/name, configuration, split


class PlacedRow(NamedTuple):
    """A row and where it stands, as `file:line`, for the messages about it."""

    row: dict[str, Any]
    place: str


class BadRows:
    """Rows that cannot be used: the first NAMED with their place and what is wrong, the others counted."""

    def __init__(self, advice: str = ""):
        self.advice, self.count, self.named = advice, 0, []

    def add(self, problem: str | ValueError) -> None:
        """Note a problem, which begins with the row's place."""
        self.count += 1
        if self.count <= NAMED:
            self.named.append(str(problem))

    def refuse(self) -> None:
        """Raises:
        ValueError: there are any.
        """
        if not self.count:
            return
        head = f"{self.count} rows cannot be used: " if self.count > 1 else ""
        more = f"; and {self.count - NAMED} more" if self.count > NAMED else ""
        raise ValueError(f"{head}{'; '.join(self.named)}{more}{self.advice}")


def read_rows(names: Iterable[str | Path]) -> list[PlacedRow]:
    """All rows of all files, in order.

    Raises:
        ValueError: see `iterate`, or rows that are not readable, named as `BadRows` does.
    """
    bad = BadRows()
    rows = [placed for name in names for placed in iterate(name, bad)]
    bad.refuse()
    return rows


def iterate(name: str | Path, bad: BadRows, stream: bool = False) -> Iterator[PlacedRow]:
    """The readable rows of a file, of the files in a folder, or of a data set of the hub; the others go to `bad`.

    Args:
        name: a .jsonl, .json or .parquet file, a folder of such files or one that `datasets` saved, or a hub id, with a
            configuration and a split other than `train` as in `openai/gsm8k/main:test`.
        stream: read a data set of the hub from there, without a copy here.

    Raises:
        ValueError: there is no such file, it is empty, of another kind, or not readable as a whole.
    """
    found, bad_before = 0, bad.count
    for rows in _readers(name, stream):
        for placed in rows(bad):
            found += 1
            yield placed
    if not found and bad.count == bad_before:
        raise ValueError(f"{name}: there are no rows in it")


def digest(name: str | Path) -> str:
    """Tells the content that `iterate` reads from any other.

    Raises:
        ValueError: as `iterate`.
    """
    path = Path(name)
    if not path.exists():
        return _hub(str(name))._fingerprint
    total = sha256()
    for file in _files(path) if path.is_dir() else [path]:
        with file.open("rb") as content:
            total.update(file_digest(content, "sha256").digest())
    return total.hexdigest()


def sizes(name: str | Path) -> dict[str, int]:
    """Bytes of a file, or of each file in a folder; nothing for a hub id.

    Raises:
        ValueError: there is no such file, and it is no hub id either.
    """
    path = Path(name)
    if not path.exists():
        _hub_id(str(name))
        return {}
    return {str(file): file.stat().st_size for file in (_files(path) if path.is_dir() else [path])}


def _readers(name: str | Path, stream: bool) -> list[Callable[[BadRows], Iterator[PlacedRow]]]:
    path = Path(name)
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(
            str(path / split) for split in json.loads((path / "dataset_dict.json").read_text())["splits"]
        )
        raise ValueError(f"{path}: the folder has several sets, name one: {splits}")
    if path.is_dir() and not (path / "dataset_info.json").exists():
        return [reader for file in _files(path) for reader in _readers(file, stream)]
    if path.is_dir():
        return [lambda bad: _read_dataset(str(name), _saved(path))]
    if not path.exists():
        return [lambda bad: _read_dataset(str(name), _hub(str(name), stream))]
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: data files end in {', '.join(_READERS)}")
    return [lambda bad: _READERS[path.suffix](path, bad)]


def _files(folder: Path) -> list[Path]:
    kinds = (".arrow",) if (folder / "dataset_info.json").exists() else tuple(_READERS)
    files = sorted(file for file in folder.rglob("*") if file.suffix in kinds)
    if not files:
        raise ValueError(f"{folder}: the folder has no {', '.join(kinds)} files")
    return files


def _read_jsonl(file: Path, bad: BadRows) -> Iterator[PlacedRow]:
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
        row = json.loads(line, object_pairs_hook=_unique)
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
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{', '.join(twice)} given twice")
    return row


def _read_json(file: Path, bad: BadRows) -> Iterator[PlacedRow]:
    try:
        rows = json.loads(file.read_bytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file}: a .json file is a list of rows, this is {type(rows).__name__}; is it .jsonl?")
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield PlacedRow(row, f"{file}:{number}")
        else:
            bad.add(f"{file}:{number}: a row is a JSON object, this is {type(row).__name__}")


def _read_parquet(file: Path, bad: BadRows) -> Iterator[PlacedRow]:
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        names = parquet.schema_arrow.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{file}: {', '.join(twice)} given twice")
        number = 0
        for batch in parquet.iter_batches(ROWS_AT_ONCE):
            yield from _of_batch(batch, str(file), number, bad)
            number += len(batch)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a readable parquet file ({error})") from error


def _of_batch(batch: RecordBatch, name: str, before: int, bad: BadRows) -> Iterator[PlacedRow]:
    for i in range(len(batch)):
        place = f"{name}:{before + i + 1}"
        try:
            [row] = batch.slice(i, 1).to_pylist()
        except UnicodeDecodeError as error:
            bad.add(f"{place}: not UTF-8 ({error})")
        else:
            yield PlacedRow(row, place)


def _read_dataset(name: str, dataset: Any) -> Iterator[PlacedRow]:
    for number, row in enumerate(dataset, start=1):
        yield PlacedRow(row, f"{name}:{number}")


def _saved(folder: Path) -> Any:
    from datasets import load_from_disk  # slow to import, and seldom needed

    return load_from_disk(str(folder))


def _hub_id(name: str) -> tuple[str, str | None, str]:
    """Owner and name, configuration and split of a data set of the hub.

    Raises:
        ValueError: it cannot be one.
    """
    found = HUB_ID.fullmatch(name)
    if not found or Path(name).suffix in _READERS:
        raise ValueError(f"{name}: no such file or folder")
    identity, configuration, split = found.groups()
    return identity, configuration, split or "train"


def _hub(name: str, stream: bool = False) -> Any:
    """A data set of the hub.

    Raises:
        ValueError: no such file here, and no such data set there, or no hub.
    """
    identity, configuration, split = _hub_id(name)
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(identity, configuration, split=split, streaming=stream)
    except (OSError, ValueError, DatasetNotFoundError) as error:
        raise ValueError(
            f"{name}: no such file or folder in {Path.cwd()}, and the hub does not give that data set ({error})"
        ) from error


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
