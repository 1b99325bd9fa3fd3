"""Means over seeds, with their 95 % intervals."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean over repetitions."""

    mean: float
    half: float | None  # half the width of Student's 95 % interval; None for one value
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.half is None else f"{self.mean:.4g} ± {self.half:.2g}"

    def percent(self) -> str:
        """A share without its sign %."""
        return f"{100 * self.mean:.1f}" if self.half is None else f"{100 * self.mean:.1f} ± {100 * self.half:.1f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of at least one value, with its interval."""
    count = len(values)
    if count == 1:
        return Estimate(values[0], None, 1)
    from scipy.stats import t as student  # of the extra plot

    half = student.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(statistics.fmean(values), float(half), count)
