"""Show the steps of a run: a progress bar on a terminal, plain lines in a log."""

import sys
import time

from tqdm import tqdm

from data.quantities import duration_text
from data.terminal import printable
from trainer.config import TrainerConfig
from trainer.distributed import Distributed

SHOWN = 3  # validation metrics of a line
LINES = 10  # of a run without a bar, beside those of its validations
LINE_SECONDS = 600  # without a bar, after which a step has a line in any case


def shows_bars(config: TrainerConfig, distributed: Distributed) -> bool:
    """Whether this rank shows progress bars: rank 0 on a terminal."""
    return distributed.is_main and config.progress and "console" in config.logger and sys.stderr.isatty()


def write(text: str) -> None:
    """Print a text above the progress bars, if there are any."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(printable(text), flush=True)


class Console:
    """Shows loss, validation, speed and the time left.

    Args:
        steps: of the run.
        done: steps of earlier processes.
        bars: show a bar, and lines at validations only.
        on_gpu: show the peak of the GPU's memory.
        validated: name and value of the last validation, if any.
    """

    def __init__(self, steps: int, done: int, bars: bool, on_gpu: bool, validated: tuple[str | None, float | None]):
        self.steps, self.bars, self.on_gpu = steps, bars, on_gpu
        name, value = validated
        self._validated = [] if value is None else [f"{name} {value:.4g}"]
        self._began: tuple[float, int] | None = None  # time and number of the first step, which may compile
        self._written = time.perf_counter()
        self._bar = tqdm(total=steps, initial=done, desc="train", unit="step", dynamic_ncols=True, disable=not bars)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Show a step."""
        validated = [f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith("val/")][:SHOWN]
        self._validated = validated[:1] or self._validated
        loss = f"loss {metrics['train/loss']:.4f}"
        speed = [f"{metrics['perf/tokens_per_second']:,.0f} tokens/s"]
        if self.on_gpu:
            speed.append(f"GPU {metrics['perf/memory_gib']:.3g} GiB")
        self._bar.set_postfix_str(", ".join([loss, *self._validated, *speed]), refresh=False)
        self._bar.update()
        if validated or (not self.bars and self._is_due(step)):
            write(f"step {step:,} of {self.steps:,}: {', '.join([loss, *validated, *speed, *self._left(step)])}")
            self._written = time.perf_counter()
        self._began = self._began or (time.perf_counter(), step)

    def _is_due(self, step: int) -> bool:
        tenth = step * LINES // self.steps > (step - 1) * LINES // self.steps
        return tenth or time.perf_counter() - self._written > LINE_SECONDS

    def _left(self, step: int) -> list[str]:
        """The time of the steps left, with validations and saves as often as so far."""
        if self._began is None or step == self.steps:
            return []
        began, first = self._began
        return [f"{duration_text((time.perf_counter() - began) / (step - first) * (self.steps - step))} left"]

    def unpause(self) -> None:
        """Leave the time since the last step out of the bar's rate."""
        self._bar.unpause()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
