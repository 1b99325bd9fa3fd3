"""Where checkpoints are: a directory, a GGUF file, or the hub."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from data.storage import ask_hub, first_line, refuse_pointer

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
TEXTS = ("merges.txt", "chat_template.jinja")
FILES = {  # of a directory, by what is read from them
    "the tokenizer": ("*token*.json", "vocab.json", "chat_template.json"),
    "the weights": ("*.safetensors", "*.safetensors.index.json", GENERATION_CONFIG_NAME),
}
MOST_NAMED = 6
GGUF_PACKAGES = ("gguf", "accelerate")
GGUF_ROPE = ("rope_freqs", "rope_factors")  # weights that scale rotary frequencies


def split_gguf(source: str) -> tuple[str, str | None]:
    """What `from_pretrained` takes as the place and as `gguf_file`, which is None for a directory or hub id."""
    path = Path(source)
    return (str(path.parent), path.name) if is_gguf(source) else (source, None)


def local(source: str | Path) -> str:
    """A source as text, with the user's home for a `~` at its beginning."""
    return os.path.expanduser(source)


@contextmanager
def readable(source: str, what: str) -> Iterator[None]:
    """Turn any error of reading `model.path` into a ValueError with the file at fault and what to do.

    The libraries take files as they come: a broken one ends in whatever fails first.

    Args:
        what: that is read, a key of FILES.
    """
    gguf = is_gguf(source)
    if gguf:
        _check_gguf(source)
    elif Path(source).is_file():
        raise ValueError(f"model.path={source}: a model is a directory, a hub id or a .gguf file")
    for name in TEXTS:  # which would be taken as they are
        refuse_pointer(Path(source) / name)
    silence = None if Path(source).exists() or not HUB_ID.fullmatch(source) else ask_hub()
    try:
        yield
    except Exception as error:
        files = _files(source, what)
        for file in files:
            _check_file(file)
        reason = f"{'the file' if gguf else what} cannot be read ({first_line(error)})"
        if 0 < len(files) <= MOST_NAMED:
            reason += f" from {', '.join(file.name for file in files)}"
        if silence:
            reason = f"there is no answer ({silence}); {reason}"
        raise ValueError(f"model.path={source}: {_advice(source, reason)}") from error


def _files(source: str, what: str) -> list[Path]:
    return [file for pattern in FILES.get(what, (what,)) for file in sorted(Path(source).glob(pattern))]


def _check_file(file: Path) -> None:
    """Refuse a file that is none, a git-lfs pointer, or by its name JSON and no object.

    Raises:
        ValueError: naming it.
    """
    if not file.is_file():
        raise ValueError(f"{file}: is not a file")
    refuse_pointer(file)
    if file.suffix == ".json":
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: not JSON in UTF-8 ({first_line(error)})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file}: not a JSON object")


def _advice(source: str, reason: str) -> str:
    """What was tried at a source that cannot be read, and what to do."""
    path = Path(source)
    if is_gguf(source):
        return f"{reason}; it may be cut short"
    if path.is_dir() and not (path / "config.json").exists():
        below = [str(file.parent) for file in sorted(path.glob("*/config.json"))]
        hint = f"did you mean {' or '.join(below)}?" if below else "give one that holds a model"
        return f"there is no config.json in it; {hint}"
    if path.exists():
        return reason
    if not HUB_ID.fullmatch(source):
        return "no such directory, and no hub id either"
    return (
        f"there is no directory {path.resolve()}; from the hub, or what is kept of it in {constants.HF_HUB_CACHE}, "
        f"{reason}. Give the path of a directory: `hf download {source} --local-dir DIR` makes one where there is a hub"
    )


def is_gguf(source: str) -> bool:
    """Whether a source is a GGUF file, by its name."""
    return Path(source).suffix.lower() == ".gguf"


def _check_gguf(source: str) -> None:
    if not Path(source).is_file():
        raise ValueError(f"model.path={source}: no such file")
    refuse_pointer(Path(source))
    if missing := [name for name in GGUF_PACKAGES if find_spec(name) is None]:
        raise ValueError(f"model.path={source}: reading it needs {', '.join(missing)}: pip install 'diffllm[gguf]'")


def unexpected_in_gguf(source: str) -> list[str]:
    """Weights in a GGUF file that its architecture does not have, which Transformers would leave out.

    Raises:
        ValueError: it cannot be read, is a part of a model, or scales its rotary frequencies, which would be lost too.
    """
    import gguf

    with readable(source, "the file"):
        reader = gguf.GGUFReader(source)
        kind = reader.get_field("general.architecture").contents()
        fields = map(reader.get_field, ("split.count", f"{kind}.rope.scaling.type"))
        parts, scaling = (field and field.contents() for field in fields)
        names = [tensor.name for tensor in reader.tensors]
    if parts and parts > 1:
        raise ValueError(f"model.path={source}: one of the {parts} files of a model; `gguf-split --merge` joins them")
    scaled = [name for name in names if name.startswith(GGUF_ROPE)]
    if scaling not in (None, "none"):
        scaled.append(f"rope.scaling.type={scaling}")
    if scaled:
        raise ValueError(
            f"model.path={source}: its rotary frequencies are scaled ({', '.join(scaled)}), which Transformers does "
            "not read from GGUF; give the safetensors checkpoint"
        )
    architectures = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[architectures[kind]]}
    plain = {name: re.sub(r"\.(weight|bias)$", "", re.sub(r"^blk\.\d+", "blk.{bid}", name)) for name in names}
    return [name for name in names if plain[name] not in known]


def on_hub(auto_map: dict[str, Any], repository: str) -> dict[str, Any]:
    """The classes of an `auto_map` by names that hold outside their repository, `REPOSITORY--file.Class`."""

    def full(name: Any) -> Any:
        if isinstance(name, list):
            return [full(part) for part in name]
        return name if name is None or "--" in name else f"{repository}--{name}"

    return {auto: full(name) for auto, name in auto_map.items()}


def generation_settings(source: str | None) -> dict[str, Any]:
    """The generation_config.json of a checkpoint, empty if there is none.

    Raises:
        ValueError: it is no JSON object, or its eos_token_id is no token.
    """
    if source is None or is_gguf(source):
        return {}
    with readable(source, GENERATION_CONFIG_NAME):
        file = cached_file(
            source,
            GENERATION_CONFIG_NAME,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        settings = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{source}: {GENERATION_CONFIG_NAME} is not a JSON object")
    ends = settings.get("eos_token_id")
    if not all(type(token) is int for token in (ends if isinstance(ends, list) else [ends]) if token is not None):
        raise ValueError(f"{source}: {GENERATION_CONFIG_NAME} has eos_token_id={ends!r}: must be a token, or a list")
    return settings


def copy_code(source: str | None, directory: Path) -> None:
    """Copy the Python files of a local checkpoint: those that its `auto_map` names, and what they import."""
    if source is not None and Path(source).is_dir() and Path(source).resolve() != directory.resolve():
        for file in Path(source).glob("*.py"):
            shutil.copy(file, directory)
