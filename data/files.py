"""Files, folders and hub data sets into rows, each with the place it came from."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow.parquet
from pyarrow import ArrowException, RecordBatch

MAX_LINE = 2**24  # bytes of a row in a .jsonl file: what is longer has lost its line ends
ROWS_AT_ONCE = 1000  # of a parquet file
NAMED = 10
ENDS = 2**20  # bytes at both ends of a file
SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev)(?![a-z])")  # in the name of a file
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

    def forget(self) -> None:
        """Begin anew."""
        self.count, self.named = 0, []

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


def outline(name: str | Path) -> list[tuple[str, int, str]]:
    """Of each file its name, bytes, and a digest of how it begins and ends: read at once, however large it is.

    Nothing for a hub id, behind which the rows may change.

    Raises:
        ValueError: there is no such file, and it is no hub id either.
    """
    path = Path(name)
    if not path.exists():
        _hub_id(str(name))
        return []
    traits = []
    for file in _files(path) if path.is_dir() else [path]:
        size = file.stat().st_size
        with file.open("rb") as content:
            ends = sha256(content.read(ENDS))
            content.seek(max(0, size - ENDS))
            ends.update(content.read(ENDS))
        traits.append((str(file), size, ends.hexdigest()))
    return traits


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
    found = [SPLIT.search(str(file.relative_to(folder)).lower()) for file in files]
    splits = {match[1] for match in found if match}
    if len(splits) > 1:
        raise ValueError(
            f"{folder}: the folder has files of several splits ({', '.join(sorted(splits))}), name those of one"
        )
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
        raise ValueError(_twice(name for name, _ in pairs))
    return row


def _twice(names: Iterable[str]) -> str:
    return f"{listed([name for name, count in Counter(names).items() if count > 1])} given twice"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def _read_json(file: Path, bad: BadRows) -> Iterator[PlacedRow]:
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


def _read_parquet(file: Path, bad: BadRows) -> Iterator[PlacedRow]:
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        names = parquet.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError(f"{file}: {_twice(names)}")
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
        except (ValueError, OverflowError, ArrowException) as error:  # such as text that is not UTF-8
            bad.add(f"{place}: cannot be read ({error})")
        else:
            yield PlacedRow(row, place)


def _read_dataset(name: str, dataset: Any) -> Iterator[PlacedRow]:
    number = 0
    try:
        for row in dataset:
            number += 1
            yield PlacedRow(row, f"{name}:{number}")
    except _dataset_errors() as error:
        raise ValueError(f"{name}: the data set cannot be read beyond row {number} ({error})") from error


def _dataset_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, RuntimeError, ArrowException, DatasetsError)


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

    try:
        return load_dataset(identity, configuration, split=split, streaming=stream)
    except _dataset_errors() as error:
        raise ValueError(
            f"{name}: no such file or folder in {Path.cwd()}, and the hub does not give that data set ({error})"
        ) from error


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
