"""Write files and directories whole or not at all; lock and digest them; name the errors of a disk; ask the hub."""

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import file_digest
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash
from huggingface_hub import constants, get_session, is_offline_mode

FULL_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full: the user's quota is used up",
    errno.EFBIG: "the disk is full: the limit on the size of a file is reached (ulimit -f)",
}
POINTER = b"version https://git-lfs.github.com/spec/"  # first bytes of a git-lfs pointer
UNFINISHED, REPLACED = ".unfinished", ".replaced"
HUB_SECONDS = 10  # to wait for the hub's answer


class DigestedFile(BufferedWriter):
    """A new binary file whose XXH3 digest is computed during the write."""

    failure: OSError | None = None  # torch replaces it by an error without its cause

    def __init__(self, path: str | os.PathLike):
        super().__init__(FileIO(path, "w"))
        self._digest = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise

    def hexdigest(self) -> str:
        """Digest of everything written so far."""
        return self._digest.hexdigest()


def digest_bytes(content: bytes) -> str:
    """XXH3 digest, 128 bits in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def digest_file(path: Path) -> str:
    """XXH3 digest of a file's content, 128 bits in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, xxhash.xxh3_128).hexdigest()


@contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that gets its name when the block ends. An older file of that name stays until then.

    Args:
        mode: `w` for UTF-8 text, `wb` for bytes.

    Raises:
        OSError: it cannot be written, as on a full disk; the message names it.
    """
    path = Path(path)
    unfinished = unfinished_of(path)
    with writing(path):
        remove(unfinished)
        try:
            with unfinished.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Make a directory to write in, which takes the name `path` when the block ends.

    Args:
        replace: replace an older directory.

    Raises:
        ValueError: `path` exists and is not empty, unless `replace`.
        OSError: it cannot be written, as on a full disk; an older directory is kept.
    """
    path = Path(path).expanduser().resolve()
    if not replace and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists: delete it, or name another directory")
    unfinished = unfinished_of(path)
    with writing(path):
        remove(unfinished)
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            publish(unfinished, path)
        finally:
            remove(unfinished)


def publish(unfinished: Path, path: Path) -> None:
    """Rename a directory to its name, then delete an older one of that name."""
    replaced = path.with_name(path.name + REPLACED)
    remove(replaced)
    if path.exists():
        path.rename(replaced)
    unfinished.rename(path)
    remove(replaced)


def unfinished_of(path: Path) -> Path:
    """Name of a file or directory during the write."""
    return path.with_name(path.name + UNFINISHED)


@contextmanager
def lock_file(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock file. The operating system frees the lock when the process ends, even by a kill.

    `fcntl.lockf` and not `flock`: a forked loader worker that outlives its rank must not keep the lock.

    Args:
        wait: wait for a process that holds the lock, also one of another user.

    Raises:
        ValueError: another process holds the lock, unless `wait`; or `path` is a symbolic link.
    """
    refuse_links(path)
    with path.open("a") as file:
        if wait:
            with suppress(PermissionError):  # another user's file, which has this mode already
                os.fchmod(file.fileno(), 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"another run writes to {path.parent}: wait for it, or name another") from error
        yield


def remove(path: Path) -> None:
    """Delete a file, a link, or a directory with its content as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name the file or directory and the cause if writing fails.

    Raises:
        OSError: in place of an error of the operating system, Arrow, safetensors or torch. Errors of other files pass
            unchanged.
    """
    try:
        yield
    except Exception as error:
        full, other = find_full_disk(error), getattr(error, "filename", None)
        if full or (isinstance(error, OSError) and str(other or path).startswith(str(path))):
            number = getattr(error, "errno", None) or (errno.ENOSPC if full else errno.EIO)
            raise OSError(number, f"{path} could not be written: {full or error}") from error
        raise


def find_full_disk(error: BaseException | None) -> str | None:
    """Message of a full disk if it caused an error; None otherwise.

    Errors of torch and safetensors contain the text of the system's error.
    """
    while error is not None:
        for number, words in FULL_DISK.items():
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return words
        error = error.__cause__ or error.__context__
    return None


def refuse_links(*paths: Path) -> None:
    """Refuse paths that a run must not write through, or cannot replace.

    Raises:
        ValueError: a path is a symbolic link, or neither a file nor a directory.
    """
    for path in paths:
        if path.is_symlink():
            raise ValueError(
                f"{path} is a symbolic link to {os.readlink(path)}: a run does not write through links. "
                "Delete the link, or name another directory"
            )
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is neither a file nor a directory: delete it, or name another directory")


class Records(NamedTuple):
    """The content of a .jsonl file."""

    objects: list[dict[str, Any]]
    ends: list[int]  # offset in bytes of the end of each


def read_records(path: Path) -> Records:
    """Read JSON objects, one a line. Drop a last line that a kill or power cut has cut short, and say so on stderr.

    Raises:
        ValueError: another line is not a JSON object; the message names it.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = _without_torn_end(content)
    if torn := len(content) - len(whole):
        print(f"{path}: its torn end of {torn} bytes is dropped", file=sys.stderr, flush=True)
    objects, ends, end = [], [], 0
    for number, line in enumerate(whole.splitlines(keepends=True), start=1):
        end += len(line)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}); delete that line") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: not a JSON object but {type(record).__name__}; delete that line")
        objects.append(record)
        ends.append(end)
    return Records(objects, ends)


def _without_torn_end(content: bytes) -> bytes:
    """Whole lines; a power cut can leave NULs after them."""
    written = content.rstrip(b"\0")
    return written[: written.rfind(b"\n") + 1]


class AppendedRecords:
    """A .jsonl file to append to.

    Args:
        keep: bytes of the file that stay; the first record replaces the rest. By default all whole lines stay.

    Raises:
        ValueError: it is a symbolic link.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, keep: int | None = None):
        self.path = path
        refuse_links(path)
        with writing(path):
            self._file = path.open("ab", buffering=0)
        self._keep = len(_without_torn_end(path.read_bytes())) if keep is None else keep

    def append(self, record: dict[str, Any]) -> None:
        """Write a record.

        Raises:
            OSError: it cannot be written, or the file was deleted.
        """
        try:
            is_same = os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise OSError(f"{self.path} was deleted or replaced during the run; start the same command again")
        line = (json.dumps(record) + "\n").encode()
        with writing(self.path):
            if self._keep is not None:
                self._file.truncate(self._keep)
                self._keep = None
            while line:  # a nearly full disk takes a part, then raises
                line = line[self._file.write(line) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def refuse_pointer(path: Path) -> None:
    """Refuse a git-lfs pointer.

    Raises:
        ValueError: git-lfs has not fetched the file.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise ValueError(f"{path}: a git-lfs pointer, not the file itself; `git lfs pull` fetches it")


def write_object(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=2) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing or has other content; the message names it.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object but {type(content).__name__}")
    return content


@cache
def ask_hub() -> str | None:
    """Return the error of a hub that does not answer; None if it answers, or if the user has set the libraries offline.

    The libraries would retry for minutes, so a silent hub switches them offline for the rest of the process.
    """
    if is_offline_mode():
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # errors of the HTTP library of huggingface_hub
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT}: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    """First line of an error's message, or the name of its type."""
    message = f"no {error}" if isinstance(error, KeyError) else str(error).strip()
    return (message or type(error).__name__).splitlines()[0]
