"""Fields of the sampling settings: their help, and their values as text."""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import Field, fields, replace
from types import NoneType
from typing import Any, get_args, get_type_hints

from data.errors import nearest
from sampling import SamplingConfig
from sampling.config import unescape

AT_LOADING = ("compile", "batch_size")  # decided when the model is loaded; a page samples one row
FIELDS: dict[str, Field] = {item.name: item for item in fields(SamplingConfig) if item.name not in AT_LOADING}
TYPES = get_type_hints(SamplingConfig)
MAIN = ("max_new_tokens", "steps", "alg", "transfer", "temperature", "seed")  # shown first
_ESCAPED = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def is_optional(name: str) -> bool:
    """Whether null is a value of the field."""
    return NoneType in get_args(TYPES[name])


def kind(name: str) -> type:
    """Type of the field's values, null aside."""
    return next((each for each in get_args(TYPES[name]) if each is not NoneType and not is_list(name)), TYPES[name])


def is_list(name: str) -> bool:
    """Whether the field is a list of texts."""
    return TYPES[name] == list[str]


def to_text(name: str, value: Any) -> str:
    """Write a value as on the command line; a list as one text a line."""
    if is_list(name):
        return "\n".join(re.sub(r"[\\\n\t\r]", lambda found: _ESCAPED[found[0]], text) for text in value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def from_text(name: str, text: str) -> Any:
    """Read a value that `to_text` wrote, or a user.

    Raises:
        ValueError: it is of another type.
    """
    if is_list(name):
        return unescape(f"sampling.{name}", [line for line in text.split("\n") if line])
    if is_optional(name) and text.strip() in ("", "null"):
        return None
    try:
        if kind(name) is bool:
            return {"true": True, "false": False}[text.strip().lower()]
        return kind(name)(text.strip())
    except (ValueError, KeyError) as error:
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind(name)]
        raise ValueError(f"sampling.{name}={text}: must be {wanted}") from error


def changed(config: SamplingConfig, line: str, preset: Callable[[str], SamplingConfig]) -> SamplingConfig:
    """Apply changes such as `steps=6 alg=origin`, or `sampling=fast steps=6`, to settings.

    Args:
        preset: returns the settings of a choice of `sampling`.

    Raises:
        ValueError: an unknown setting, or a value that is missing or refused.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ValueError(f"{line}: {error}") from error
    for word in words:
        if not all(word.partition("=")):
            raise ValueError(f"{word}: write NAME=VALUE, such as steps=6")
    changes = dict(word.removeprefix("sampling.").split("=", 1) for word in words)
    if choice := changes.pop("sampling", None):
        config = replace(preset(choice), seed=config.seed)
    return replace(config, **read(changes))


def read(texts: Mapping[str, str]) -> dict[str, Any]:
    """Values of settings by their names.

    Raises:
        ValueError: an unknown setting, or a value of another type.
    """
    for name in texts:
        if name not in FIELDS:
            raise ValueError(f"{name}: no such setting of the page; {nearest(name, [*FIELDS])}")
    return {name: from_text(name, text) for name, text in texts.items()}
