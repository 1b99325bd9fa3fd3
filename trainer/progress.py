"""Counts and validations of a run that a checkpoint keeps, and its time."""

import math
import time
from dataclasses import dataclass, field, fields
from typing import Any

from data.quantities import duration_text

ESTIMATED_AFTER = 10  # steps


@dataclass
class Progress:
    """Counts and validations that a checkpoint keeps."""

    skipped_steps: int = 0  # without a masked token
    nonfinite_steps: int = 0  # with a loss or gradient that is not finite
    rows: str | None = None  # digest of the validation rows
    metric: str | None = None  # name of the first validation metric
    value: float | None = None  # its last value
    best: float | None = None  # its lowest value
    best_step: int = 0
    not_better: int = 0  # validations since

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Progress":
        """Counts in a checkpoint.json; an older one may lack some."""
        return cls(**{item.name: manifest[item.name] for item in fields(cls) if item.name in manifest})

    @property
    def diverged(self) -> bool:
        """Whether the last validation is not finite."""
        return self.metric is not None and self.value is None

    def judge(self, step: int, metrics: dict[str, float]) -> bool:
        """Compare the first metric of a validation with its lowest value. Return whether it is lower."""
        if not metrics:
            return False
        self.metric, value = next(iter(metrics.items()))
        self.value = value if math.isfinite(value) else None  # a manifest is JSON
        better = self.value is not None and (self.best is None or value < self.best)
        if better:
            self.best, self.best_step, self.not_better = value, step, 0
        else:
            self.not_better += 1
        return better

    def forget_best(self, rows: str | None) -> None:
        """Judge the next validation, of these rows, as the first."""
        self.rows, self.best, self.best_step, self.not_better = rows, None, 0, 0


@dataclass
class Clock:
    """Time, steps and tokens of this process's part of a run."""

    steps: int = 0
    tokens: float = 0  # without padding
    began: float = field(default_factory=time.perf_counter)
    _later_steps: float = 0  # seconds of all steps but the first, which may compile

    def add(self, seconds: float, tokens: float) -> None:
        """Count a step."""
        self._later_steps += seconds if self.steps else 0
        self.steps += 1
        self.tokens += tokens

    def estimate(self, left: int) -> str | None:
        """A line with the time of the steps left, once after ESTIMATED_AFTER steps."""
        if self.steps != ESTIMATED_AFTER or not left:
            return None
        seconds = self._later_steps / (self.steps - 1)
        rest = duration_text(seconds * left)
        return f"{duration_text(seconds)} a step: {rest} for the {left:,} steps left, without validation"

    @property
    def total(self) -> str:
        """Time since the start."""
        return duration_text(time.perf_counter() - self.began)
