"""Turn errors of unreadable checkpoints into one line with the faulty file and advice."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from transformers.utils import GENERATION_CONFIG_NAME

from data.storage import ask_hub, first_line, refuse_pointer
from diffllm.gguf import check_gguf, is_gguf

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
TEXTS = ("merges.txt", "chat_template.jinja")
FILES = {  # patterns by content
    "the tokenizer": ("*token*.json", "vocab.json", "chat_template.json"),
    "the weights": ("*.safetensors", "*.safetensors.index.json", GENERATION_CONFIG_NAME),
}
MOST_NAMED = 6


@contextmanager
def readable(name: str, what: str) -> Iterator[None]:
    """Turn any error of reading a checkpoint into a ValueError with the faulty file and advice.

    The libraries do not check their files: a broken one raises any error.

    Args:
        name: a directory, a hub id or a GGUF file.
        what: a key of FILES, or the name of one file.
    """
    gguf = is_gguf(name)
    if gguf:
        check_gguf(name)
    elif Path(name).is_file():
        raise ValueError(f"model.path={name}: a model is a directory, a hub id or a .gguf file")
    for text in TEXTS:  # a git-lfs pointer would be read as text
        refuse_pointer(Path(name) / text)
    silence = None if Path(name).exists() or not HUB_ID.fullmatch(name) else ask_hub()
    try:
        yield
    except Exception as error:
        files = _files(name, what)
        for file in files:
            _check_file(file)
        reason = f"{'the file' if gguf else what} cannot be read ({first_line(error)})"
        if 0 < len(files) <= MOST_NAMED:
            reason += f" from {', '.join(file.name for file in files)}"
        if silence:
            reason = f"the hub does not answer ({silence}); {reason}"
        raise ValueError(f"model.path={name}: {_advice(name, reason)}") from error


def _files(name: str, what: str) -> list[Path]:
    return [file for pattern in FILES.get(what, (what,)) for file in sorted(Path(name).glob(pattern))]


def _check_file(file: Path) -> None:
    """Refuse a directory, a git-lfs pointer, or a .json file without a JSON object.

    Raises:
        ValueError: the message names the file.
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


def _advice(name: str, reason: str) -> str:
    """Reason for the error, and advice."""
    path = Path(name)
    if is_gguf(name):
        return f"{reason}; it may be cut short"
    if path.is_dir() and not (path / "config.json").exists():
        below = [str(file.parent) for file in sorted(path.glob("*/config.json"))]
        hint = f"did you mean {' or '.join(below)}?" if below else "give one that holds a model"
        return f"it has no config.json; {hint}"
    if path.exists():
        return reason
    if not HUB_ID.fullmatch(name):
        return "no such directory, and no hub id either"
    return (
        f"no directory {path.resolve()}; from the hub or its cache {constants.HF_HUB_CACHE}: {reason}. Give the path "
        f"of a directory, such as `hf download {name} --local-dir DIR` makes"
    )
