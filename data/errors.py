"""Parts of error messages: what differs, and what a misspelt name may mean."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Name each key whose values differ, as `NAME was SAVED and is CURRENT`."""
    return [
        f"{name} was {saved.get(name, 'absent')} and is {current.get(name, 'absent')}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint for a misspelt name: the closest allowed ones, or all."""
    close = difflib.get_close_matches(name, allowed := list(allowed), n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(allowed)}"
