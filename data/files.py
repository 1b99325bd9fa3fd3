"""Read rows of files, folders and hub data sets, each with its place."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from pyarrow import ArrowException

from data.errors import BadRows, listed
from data.parquet import ROWS_AT_ONCE, read_parquet, too_large
from data.readers import PlacedRow, read_json, read_jsonl
from data.storage import ask_hub, read_object, refuse_pointer

# By suffix. A reader yields readable rows and adds the others to `bad`.
READERS = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"  # last bytes of a stream; without the check a cut stream would look whole
ENDS = 2**20  # bytes at each end of a file
SPLITS = "train|test|validation|valid|val|dev"
SHARD = re.compile(rf"((?:{SPLITS})\w*)-\d{{5}}-of-\d{{5}}")  # the hub's names of files, with their split
SPLIT = re.compile(rf"(?<![a-z])({SPLITS})(?![a-z])")  # in any other name
UNREAD = re.compile(r"\.(ndjson|(jsonl|json|parquet)\.(bz2|gz|xz|zip|zst))")  # suffixes of unread files with rows
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::(\w+))?")  # owner/name, configuration, split


def read_rows(names: Iterable[str | Path]) -> list[PlacedRow]:
    """Read the rows of all files, in order.

    Raises:
        ValueError: see `iterate`, or unreadable rows, see `BadRows`.
    """
    bad = BadRows()
    rows = [placed for name in names for placed in iterate(name, bad)]
    bad.refuse()
    return rows


def iterate(name: str | Path, bad: BadRows, stream: bool = False) -> Iterator[PlacedRow]:
    """Yield the readable rows of a file, a folder or a hub data set; add the others to `bad`.

    Args:
        name: a .jsonl, .json or .parquet file; a folder of such files, or saved by `datasets`, with a split as in
            `folder:test` if it has several; or a hub id, with configuration and split as in `openai/gsm8k/main:test`.
        stream: read a hub data set without a local copy.

    Raises:
        ValueError: a file that is missing, empty, of another kind, or unreadable as a whole.
    """
    found, bad_before = 0, bad.count
    for rows in _readers(name, stream):
        for placed in rows(bad):
            found += 1
            yield placed
    if not found and bad.count == bad_before:
        raise ValueError(f"{name}: it has no rows")


def digest(name: str | Path) -> str:
    """Digest of the content that `iterate` reads, and of the file names of a folder.

    Raises:
        ValueError: see `iterate`.
    """
    path, split = _place(name)
    if not path.exists():
        return _hub(str(name))._fingerprint
    total = sha256()
    for file in _files(path, split) if path.is_dir() else [path]:
        with file.open("rb") as content:
            total.update(str(file.relative_to(path)).encode() + file_digest(content, "sha256").digest())
    return total.hexdigest()


def outline(name: str | Path) -> list[tuple[str, int, str]]:
    """Name, size, and digest of the first and last bytes of each file, in constant time.

    Empty for a hub id, whose rows may change.

    Raises:
        ValueError: neither a file nor a hub id.
    """
    path, split = _place(name)
    if not path.exists():
        _hub_id(str(name))
        return []
    traits = []
    for file in _files(path, split) if path.is_dir() else [path]:
        size = file.stat().st_size
        with file.open("rb") as content:
            ends = sha256(content.read(ENDS))
            content.seek(max(0, size - ENDS))
            ends.update(content.read(ENDS))
        traits.append((str(file), size, ends.hexdigest()))
    return traits


def _place(name: str | Path) -> tuple[Path, str | None]:
    """Path of a name, with `~` expanded, and its split of a folder, if any."""
    name = os.path.expanduser(name)
    path = Path(name)
    folder, colon, split = name.rpartition(":")
    if path.exists() or not colon or not Path(folder).is_dir() or _is_saved(Path(folder)):
        return path, None
    if (Path(folder) / "dataset_dict.json").exists() or _is_saved(Path(folder) / split):
        return Path(folder) / split, None
    return Path(folder), split


def _readers(name: str | Path, stream: bool) -> list[Callable[[BadRows], Iterator[PlacedRow]]]:
    path, split = _place(name)
    if (path / "dataset_dict.json").exists():
        raise ValueError(f"{path}: {_several(path, _splits(path))}")
    if path.is_dir() and not _is_saved(path):
        return [reader for file in _files(path, split) for reader in _readers(file, stream)]
    if path.is_dir():
        return [lambda bad: _read_dataset(str(name), _saved(path), bad)]
    if not path.exists():
        return [lambda bad: _read_dataset(str(name), _hub(str(name), stream), bad)]
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: data files end in {', '.join(READERS)}")
    refuse_pointer(path)
    return [lambda bad: READERS[path.suffix.lower()](path, bad)]


def _files(folder: Path, split: str | None = None) -> list[Path]:
    """The files with a folder's rows, or with those of a split.

    Raises:
        ValueError: no files, several sets, or files that cannot be read.
    """
    if _is_saved(folder):
        return sorted(folder.rglob("*.arrow"))
    every = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(folder)))
    files = [file for file in every if file.suffix.lower() in READERS and file.name != "dataset_infos.json"]
    if not files:
        raise ValueError(f"{folder}: the folder has no {', '.join(READERS)} files")
    splits = {file: _split_of(file.relative_to(folder)) for file in every}
    names = sorted({splits[file] for file in files} - {None})
    if split is None and len(names) > 1:
        raise ValueError(f"{folder}: {_several(folder, names)}")
    if split is not None and split not in names:
        raise ValueError(f"{folder}: no file of the folder belongs to a split {split}; {_several(folder, names)}")
    of_split = [file for file in every if split is None or splits[file] == split]
    if unread := [str(file) for file in of_split if UNREAD.search(file.name.lower())]:
        raise ValueError(
            f"{folder}: {listed(unread)} would be left out, as data files end in {', '.join(READERS)}; convert them, "
            "or name the files to read"
        )
    chosen = [file for file in files if split is None or splits[file] == split]
    if len({file.name for file in chosen}) < len(chosen):
        folders = sorted({str(file.parent) for file in chosen})
        raise ValueError(f"{folder}: several sets in one; name one of {listed(folders)}, or the files to read")
    return chosen


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _split_of(file: Path) -> str | None:
    found = SHARD.fullmatch(file.stem.lower()) or SPLIT.search(str(file).lower())
    return found and found[1]


def _several(folder: Path, splits: list[str]) -> str:
    names = " or ".join(f"{folder}:{split}" for split in splits)
    return f"name one of its splits: {names}" if names else "no name of a file in it has a split"


def _read_dataset(name: str, dataset: Any, bad: BadRows) -> Iterator[PlacedRow]:
    number = 0
    try:
        for row in _measured(dataset):
            number += 1
            place = f"{name}:{number}"
            if isinstance(row, dict):
                yield PlacedRow(row, place)
            else:
                bad.add(f"{place}: {row}")
    except _dataset_errors() as error:
        raise ValueError(f"{name}: the data set cannot be read beyond row {number} ({error})") from error


def _measured(dataset: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a data set, or the reason for a row that is too large."""
    if not hasattr(dataset, "select"):  # the rows of a stream are Python objects already
        yield from dataset
        return
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        part = dataset.select(range(start, min(start + ROWS_AT_ONCE, len(dataset))))
        reasons = too_large(part.with_format("arrow")[:])
        rows = iter(part.select([i for i in range(len(part)) if i not in reasons]) if reasons else part)
        yield from (reasons.get(i) or next(rows) for i in range(len(part)))


def _dataset_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, OverflowError, RuntimeError, ArrowException, DatasetsError)


def _is_saved(folder: Path) -> bool:
    """Whether `datasets` saved a folder, even if a file is missing."""
    return (folder / "dataset_info.json").exists() or ((folder / "state.json").exists() and any(folder.glob("*.arrow")))


def _saved(folder: Path) -> Any:
    """A data set saved by `datasets`.

    Raises:
        ValueError: a file is missing, cut short or not a JSON object.
    """
    from datasets import load_from_disk  # slow to import, and seldom needed

    for file in sorted(folder.glob("*.arrow")):
        refuse_pointer(file)
        with file.open("rb") as content:
            content.seek(-min(len(ARROW_END), file.stat().st_size), os.SEEK_END)
            if content.read() != ARROW_END:
                raise ValueError(f"{file}: it is cut short; copy it again")
    try:
        return load_from_disk(str(folder))
    except Exception as error:  # it does not check its files
        for name in ("dataset_info.json", "state.json"):
            _object(folder / name)
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{folder}: the saved data set cannot be read ({reason}); save it again") from error


def _splits(folder: Path) -> list[str]:
    """The splits of several data sets saved in one folder.

    Raises:
        ValueError: dataset_dict.json does not name them.
    """
    splits = _object(folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise ValueError(f"{folder}/dataset_dict.json: has splits={splits!r}: must be a list of names")
    return splits


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file has other content, or is a git-lfs pointer.
    """
    refuse_pointer(file)
    return read_object(file)


def _hub_id(name: str) -> tuple[str, str | None, str]:
    """Owner and name, configuration and split in a hub id.

    Raises:
        ValueError: not a hub id.
    """
    found = HUB_ID.fullmatch(name)
    if not found or Path(name).suffix in READERS:
        where = "" if Path(name).is_absolute() else f" in {Path.cwd()}"
        raise ValueError(f"{name}: no such file or folder{where}")
    identity, configuration, split = found.groups()
    return identity, configuration, split or "train"


def _hub(name: str, stream: bool = False) -> Any:
    """A hub data set.

    Raises:
        ValueError: neither a local file nor a data set of the hub, or the hub does not answer.
    """
    identity, configuration, split = _hub_id(name)
    from datasets import config, load_dataset

    no_answer = ask_hub()
    if no_answer:
        config.HF_HUB_OFFLINE = True
    try:
        return load_dataset(identity, configuration, split=split, streaming=stream)
    except _dataset_errors() as error:
        raise ValueError(
            f"{name}: no such file or folder in {Path.cwd()}, and the hub does not give that data set "
            f"({no_answer or error})"
        ) from error
