"""Fields of config dataclasses: type, default, range and choices are declared in one place."""

from collections.abc import Mapping
from copy import copy
from dataclasses import field, fields
from functools import partial
from typing import Any


def setting(
    default: Any,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    path: bool = False,
    escapes: bool = False,
    from_scratch: bool = False,
    changes_rows: str | None = None,
    free_when_resuming: bool | None = None,
    used_with: Mapping[str, tuple[Any, ...]] | None = None,
) -> Any:
    """A dataclass field; its metadata holds the other arguments.

    Args:
        default: the value, or a class that makes it. Each object gets its own copy of a list or dict.
        choices: allowed values; of a list, allowed items.
        at_least, above, at_most, below: bounds of a number, or of each number of a list. None is within all bounds.
        path: names a file or directory; a leading `~` stands for the user's directory.
        escapes: `\\n`, `\\t`, `\\r` and `\\uXXXX` stand for characters.
        from_scratch: describes a model from scratch; a checkpoint's config.json overrides it.
        changes_rows: the tokenized rows depend on it: `all` of them, or only `curated` ones.
        free_when_resuming: may differ when a run resumes. The value of a group holds for its fields without one.
        used_with: names of fields of the group, and values without which this field does nothing; no values stand for
            any that is not null, false, 0 or empty.
    """
    known = {name: value for name, value in locals().items() if name != "default"}
    if isinstance(default, type):
        return field(default_factory=default, metadata=known)
    if isinstance(default, list | dict):
        return field(default_factory=partial(copy, default), metadata=known)
    return field(default=default, metadata=known)


def check_fields(config: Any, group: str = "") -> None:
    """Compare the fields of a dataclass with their ranges and choices.

    Args:
        group: the dataclass's name in the tree, for the message.

    Raises:
        ValueError: naming field, value and rule of each mistake.
    """
    mistakes = []
    for item in fields(config):
        value = getattr(config, item.name)
        if value is not None and (rule := _broken_rule(value, item.metadata)):
            mistakes.append(f"{group + '.' if group else ''}{item.name}={value}: {rule}")
    if mistakes:
        raise ValueError("; ".join(mistakes))


def _broken_rule(value: Any, known: Mapping[str, Any]) -> str | None:
    values = value if isinstance(value, list) else [value]
    if (choices := known.get("choices")) and any(each not in choices for each in values):
        return f"choose {'from' if values is value else 'one of'} {', '.join(choices)}"
    least, above, most, below = (known.get(name) for name in ("at_least", "above", "at_most", "below"))
    if all(
        (least is None or each >= least)
        and (above is None or each > above)
        and (most is None or each <= most)
        and (below is None or each < below)
        for each in values
    ):
        return None
    return f"must be {bounds(known)}"


def bounds(known: Mapping[str, Any]) -> str | None:
    """The range of a field by its metadata, such as `at least 1` or `in (0, 1]`; None without one."""
    least, above, most, below = (known.get(name) for name in ("at_least", "above", "at_most", "below"))
    if most is None and below is None:
        if least is None:
            return None if above is None else f"above {above}" if above else "positive"
        return f"at least {least}"
    low = f"({above}" if least is None else f"[{least}"
    return f"in {low}, {f'{below})' if most is None else f'{most}]'}"
