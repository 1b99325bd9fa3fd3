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

# By the end of a file's name; each yields the readable rows, the others go to `bad`.
READERS = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream; one that is cut between batches would be read as if whole
ENDS = 2**20  # bytes at both ends of a file
SPLITS = "train|test|validation|valid|val|dev"
SHARD = re.compile(rf"((?:{SPLITS})\w*)-\d{{5}}-of-\d{{5}}")  # the name of a file by the hub's custom, with its split
SPLIT = re.compile(rf"(?<![a-z])({SPLITS})(?![a-z])")  # in any other name
UNREAD = re.compile(
    r"\.(ndjson|(jsonl|json|parquet)\.(bz2|gz|xz|zip|zst))"
)  # ends of names of files that hold rows too
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::(\w+))?")  # owner/name, configuration, split


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
        name: a .jsonl, .json or .parquet file, a folder of such files or one that `datasets` saved, of several splits
            with one of them as in `folder:test`, or a hub id, with a configuration and a split other than `train` as in
            `openai/gsm8k/main:test`.
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
    """Digest of the content that `iterate` reads; for a folder, also of its file names.

    Raises:
        ValueError: as `iterate`.
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
    """Name, size, and digest of the first and last bytes of each file, in a time that does not grow with the file.

    Empty for a hub id, whose rows may change.

    Raises:
        ValueError: there is no such file, and it is no hub id either.
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
    """Path of a name, with `~` expanded, and the split of a folder that it names."""
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
    """The files in a folder that hold its rows, or those of a split.

    Raises:
        ValueError: there are none, more than one set, or some that cannot be read.
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
        raise ValueError(f"{folder}: no file of the folder is of a split {split}; {_several(folder, names)}")
    asked = [file for file in every if split is None or splits[file] == split]
    if unread := [str(file) for file in asked if UNREAD.search(file.name.lower())]:
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
    """Yield the rows of a data set; in place of a row that is too large, the reason."""
    if not hasattr(dataset, "select"):  # a stream: its rows are Python objects already
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
    """Whether `datasets` saved a folder, which may have lost a file since."""
    return (folder / "dataset_info.json").exists() or ((folder / "state.json").exists() and any(folder.glob("*.arrow")))


def _saved(folder: Path) -> Any:
    """A data set that `datasets` saved.

    Raises:
        ValueError: a file of it is missing, cut short or no JSON object.
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
    except Exception as error:  # it takes its files as they come
        for name in ("dataset_info.json", "state.json"):
            _object(folder / name)
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{folder}: the saved data set cannot be read ({reason}); save it again") from error


def _splits(folder: Path) -> list[str]:
    """The splits of several data sets saved in one folder.

    Raises:
        ValueError: its file does not name them.
    """
    splits = _object(folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise ValueError(f"{folder}/dataset_dict.json: has splits={splits!r}: must be a list of names")
    return splits


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it is something else, or a git-lfs pointer.
    """
    refuse_pointer(file)
    return read_object(file)


def _hub_id(name: str) -> tuple[str, str | None, str]:
    """Owner and name, configuration and split of a data set of the hub.

    Raises:
        ValueError: it cannot be one.
    """
    found = HUB_ID.fullmatch(name)
    if not found or Path(name).suffix in READERS:
        raise ValueError(f"{name}: no such file or folder")
    identity, configuration, split = found.groups()
    return identity, configuration, split or "train"


def _hub(name: str, stream: bool = False) -> Any:
    """A data set of the hub.

    Raises:
        ValueError: no such file here, and no such data set there, or no hub.
    """
    identity, configuration, split = _hub_id(name)
    from datasets import config, load_dataset

    silence = ask_hub()
    if silence:
        config.HF_HUB_OFFLINE = True
    try:
        return load_dataset(identity, configuration, split=split, streaming=stream)
    except _dataset_errors() as error:
        raise ValueError(
            f"{name}: no such file or folder in {Path.cwd()}, and the hub does not give that data set "
            f"({silence or error})"
        ) from error
