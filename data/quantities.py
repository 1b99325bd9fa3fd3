"""Bytes, durations and counts in words, with three significant digits."""

UNITS = {"MiB": 2**20, "GiB": 2**30}


def unit_of(size: float) -> str:
    """The unit for a number of bytes."""
    return "GiB" if size >= UNITS["GiB"] else "MiB"


def size_text(size: float) -> str:
    """A number of bytes in words."""
    unit = unit_of(size)
    return f"{_digits(size / UNITS[unit])} {unit}"


def count_text(number: int) -> str:
    """A number of parameters in words."""
    if number >= 1e9:
        return f"{number / 1e9:.2f} billion"
    return f"{_digits(number / 1e6)} million" if number >= 1e6 else f"{number:,}"


def duration_text(seconds: float) -> str:
    """A duration in words."""
    if seconds < 1:
        return f"{_digits(seconds * 1000)} ms"
    if seconds < 120:
        return f"{_digits(seconds)} s"
    return f"{_digits(seconds / 60)} minutes" if seconds < 7200 else f"{_digits(seconds / 3600)} hours"


def _digits(value: float) -> str:
    """Three significant digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"
