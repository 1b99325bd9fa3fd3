"""Where checkpoints are: a directory, a GGUF file, or the hub."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
GGUF_PACKAGES = ("gguf", "accelerate")


def split_gguf(source: str) -> tuple[str, str | None]:
    """What `from_pretrained` takes as the place and as `gguf_file`, which is None for a directory or hub id."""
    path = Path(source)
    return (str(path.parent), path.name) if path.suffix == ".gguf" else (source, None)


@contextmanager
def readable(source: str, what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn what reading `model.path` raises into a ValueError that says what was tried and what to do.

    Args:
        errors: further ones that mean that it cannot be read.
    """
    path = Path(source)
    if gguf := path.suffix == ".gguf":
        _check_gguf(source)
    elif path.is_file():
        raise ValueError(f"model.path={source}: a model is a directory, a hub id or a .gguf file")
    try:
        yield
    except Exception as error:
        # Transformers' readers of GGUF take the bytes as they come: a broken file ends in whatever fails first.
        if not gguf and not isinstance(error, (OSError, SafetensorError, json.JSONDecodeError, *errors)):
            raise
        if not path.exists() and not HUB_ID.fullmatch(source):
            raise ValueError(f"model.path={source}: no such directory, and no hub id either") from error
        problem = f"{'the file' if gguf else what} cannot be read ({first_line(error)})"
        if gguf:
            problem += "; it may be cut short"
        if path.is_dir() and not (path / "config.json").exists():
            below = [str(file.parent) for file in sorted(path.glob("*/config.json"))]
            hint = f"did you mean {' or '.join(below)}?" if below else "give one that holds a model"
            raise ValueError(f"model.path={source}: there is no config.json in it; {hint}") from error
        if path.exists():
            raise ValueError(f"model.path={source}: {problem}") from error
        raise ValueError(
            f"model.path={source}: there is no directory {path.resolve()}, and from the hub {problem}. Give the path "
            f"of a directory: `hf download {source} --local-dir DIR` makes one where the hub can be reached"
        ) from error


def _check_gguf(source: str) -> None:
    if not Path(source).is_file():
        raise ValueError(f"model.path={source}: no such file")
    if missing := [name for name in GGUF_PACKAGES if find_spec(name) is None]:
        raise ValueError(f"model.path={source}: reading it needs {', '.join(missing)}: pip install 'diffllm[gguf]'")


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A directory to write in, which takes the name `path` when all is written.

    Raises:
        ValueError: there is something already.
    """
    path = Path(path).resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists: delete it, or name another directory")
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def on_hub(auto_map: dict[str, Any], repository: str) -> dict[str, Any]:
    """The classes of an `auto_map` by names that hold outside their repository, `REPOSITORY--file.Class`."""

    def full(name: Any) -> Any:
        if isinstance(name, list):
            return [full(part) for part in name]
        return name if name is None or "--" in name else f"{repository}--{name}"

    return {auto: full(name) for auto, name in auto_map.items()}


def copy_code(source: str | None, directory: Path) -> None:
    """Copy the Python files of a local checkpoint: those that its `auto_map` names, and what they import."""
    if source is not None and Path(source).is_dir() and Path(source).resolve() != directory.resolve():
        for file in Path(source).glob("*.py"):
            shutil.copy(file, directory)


def first_line(error: Exception) -> str:
    """What an error says, without the rest."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
