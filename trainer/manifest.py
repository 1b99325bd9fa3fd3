"""checkpoint.json: the run and step of a checkpoint, and the digest of each file."""

import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from json import dumps
from pathlib import Path
from shutil import which
from typing import Any

from packaging.version import Version

from data.storage import UNFINISHED, digest_bytes, digest_file, read_object

MANIFEST = "checkpoint.json"
FIELDS = {"step": int, "config": dict, "versions": dict, "files": dict, "skipped_steps": int}


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    packages = {name: version(name) for name in ("diffllm", "torch", "transformers", "numpy")}
    return packages | {"python": platform.python_version()}


def commit() -> str | None:
    """Commit of this checkout, with `-dirty` after changes; None without git, or if it is no checkout."""
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    if not (root / ".git").exists() or which("git") is None:
        return None
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def path_of(directory: Path, step: int) -> Path:
    """Path of a step's checkpoint."""
    return directory / f"step_{step:08d}"


def candidates(directory: Path) -> list[Path]:
    """Checkpoints of a run, whole or not, the newest first."""
    found = [path for path in directory.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def write_manifest(checkpoint: Path, fields: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Write checkpoint.json.

    Args:
        digests: XXH3 of the other files, by name.
    """
    files = {
        file.name: {"bytes": file.stat().st_size, "xxh3": digests[file.name]} for file in sorted(checkpoint.iterdir())
    }
    rest = dumps({**fields, "files": files}, indent=2).removeprefix("{")
    (checkpoint / MANIFEST).write_bytes(_signed(rest.encode()))


def _signed(rest: bytes) -> bytes:
    """Prepend the digest of `rest`, a JSON object without its first brace, as its first field."""
    return b'{\n  "digest": "' + digest_bytes(rest).encode() + b'",' + rest


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read checkpoint.json.

    Raises:
        ValueError: the file is missing, was changed, or lacks a field.
    """
    file = checkpoint / MANIFEST
    manifest = read_object(file)
    if missing := [name for name, kind in FIELDS.items() if not isinstance(manifest.get(name), kind)]:
        raise ValueError(f"{file}: {', '.join(missing)} missing or of the wrong type")
    for name, recorded in manifest["files"].items():
        if not (isinstance(recorded, dict) and recorded.keys() == {"bytes", "xxh3"} and Path(name).name == name):
            raise ValueError(f"{file} has no size and digest of {name!r}: an older version wrote it")
    content = file.read_bytes()
    if content != _signed(content.partition(b'",')[2]):
        raise ValueError(f"{file} was changed: its digest does not match")
    return manifest


def check_version(checkpoint: Path) -> None:
    """Refuse a checkpoint of a newer version.

    Raises:
        ValueError: a newer version wrote it.
    """
    writer, reader = str(read_manifest(checkpoint)["versions"].get("diffllm")), version("diffllm")
    if Version(writer) > Version(reader):
        raise ValueError(f"{checkpoint} was written by diffllm {writer}, this is {reader}: update to resume it")


def find_defect(checkpoint: Path) -> str | None:
    """Return why a directory is not a whole checkpoint, judged by names and sizes; None if it is one."""
    if not checkpoint.is_dir():
        return "no such checkpoint directory"
    if checkpoint.name.endswith(UNFINISHED):
        return "half-written, the run stopped while saving it"
    try:
        files = read_manifest(checkpoint)["files"]
    except ValueError as error:
        return f"not a checkpoint: {error}"
    for name, recorded in files.items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != recorded["bytes"]:
            return f"half-written, {name} is missing or cut short"
    return None


def find_damage(checkpoint: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Name a file whose digest is wrong, or None. Read one rank's share of the files."""
    files = read_manifest(checkpoint)["files"]
    for name in sorted(files)[rank::ranks]:
        if digest_file(checkpoint / name) != files[name]["xxh3"]:
            return f"{name} is damaged: its digest does not match checkpoint.json"
    return None


def check_whole(checkpoint: Path) -> None:
    """Refuse a directory that is not a whole checkpoint.

    Raises:
        ValueError: it is not whole, or a newer version wrote it.
    """
    if defect := find_defect(checkpoint) or find_damage(checkpoint):
        raise ValueError(f"{checkpoint}: {defect}")
    check_version(checkpoint)
