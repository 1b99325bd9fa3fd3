"""Parts of error messages: bad rows, lists of names, what a misspelt name may mean, what differs."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NAMED = 10


class BadRows:
    """Rows that cannot be used: the first NAMED with place and problem, and the number of all.

    Args:
        advice: ends the error message.
    """

    def __init__(self, advice: str = ""):
        self.advice, self.count, self.named = advice, 0, []

    def add(self, problem: str | ValueError) -> None:
        """Note a problem, which begins with the row's place."""
        self.count += 1
        if self.count <= NAMED:
            self.named.append(str(problem))

    def forget(self) -> None:
        """Forget all rows."""
        self.count, self.named = 0, []

    def refuse(self) -> None:
        """Raise ValueError if a row was added; the message names the first NAMED."""
        if self.count:
            end = "\n" if self.count > 1 else ". "
            raise ValueError(f"{self.text()}{self.advice and end + self.advice}")

    def text(self) -> str:
        """The first NAMED rows, one a line."""
        if self.count == 1:
            return self.named[0]
        more = [f"and {self.count - NAMED} more"] if self.count > NAMED else []
        return "\n".join([f"{self.count} rows cannot be used:", *self.named, *more])


def listed(names: Sequence[str]) -> str:
    """The first NAMED names, and how many follow."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def twice(names: Iterable[str]) -> str:
    """An error about the names that occur more than once."""
    return f"{listed([name for name, count in Counter(names).items() if count > 1])} given twice"


def nearest(name: str, allowed: Sequence[str]) -> str:
    """A hint for a misspelt name: names that end in it after a dot or slash, else the closest, else those known."""
    ending = [each for each in allowed if re.split("[./]", each)[-1] == name]
    close = ending or difflib.get_close_matches(name, allowed, n=2, cutoff=0.5)
    return (
        f"did you mean {' or '.join(close)}?"
        if close
        else f"known are {', '.join(allowed) if len(allowed) <= 2 * NAMED else listed(allowed)}"
    )


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Name each key whose values differ, as `NAME was SAVED and is CURRENT`."""
    return [
        f"{name} was {saved.get(name, 'absent')} and is {current.get(name, 'absent')}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
