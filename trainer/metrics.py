"""Log metrics to metrics.jsonl, the console and trackers, and sampled answers to the last two."""

import json
import math
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from data.storage import AppendedRecords, read_records, whole_file
from trainer.config import TrainerConfig
from trainer.console import Console, shows_bars, write
from trainer.distributed import Distributed
from trainer.progress import Progress
from trainer.trackers import TRACKERS, TrackedRun, Tracker, ValSample

FAILED_SECONDS, STOPPED_SECONDS = 4, 30  # for the trackers when a run has failed, or was stopped by a signal
ID_FILE, SETTINGS_FILE = "tracker_id", "settings.yaml"


def open_metrics(path: Path, done: int) -> tuple[AppendedRecords, int]:
    """Open metrics.jsonl, one line a step, to append after step `done`.

    The first appended line replaces the lines of later steps. A run that fails before it leaves the file unchanged.

    Returns:
        The file, and the last step in it, which may be after `done`; 0 without any.

    Raises:
        ValueError: a line of the file is broken; the message names it.
    """
    records = read_records(path)
    check_steps(path, records.objects)
    kept = [end for record, end in zip(*records, strict=True) if record["step"] <= done]
    last = records.objects[-1]["step"] if records.objects else 0
    return AppendedRecords(path, kept[-1] if kept else 0), last


def check_steps(path: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl.

    Raises:
        ValueError: one has no step; the message names it.
    """
    for record in records:
        if not isinstance(record.get("step"), int):
            raise ValueError(f"{path} has a line without a step: {json.dumps(record)[:80]}; delete that line")
    return records


class MetricsLog:
    """Logs the metrics of each step on rank 0. Collective to make.

    Args:
        progress: of the run so far.
        done: steps of earlier processes.
        steps: of the run.

    Raises:
        ValueError: a broken metrics.jsonl, or a tracker that cannot be used.
    """

    def __init__(
        self,
        config: TrainerConfig,
        settings: dict[str, Any],
        progress: Progress,
        done: int,
        steps: int,
        distributed: Distributed,
    ):
        self._file = self._console = None
        self._trackers: dict[str, Tracker] = {}
        self._is_new = True  # to the trackers
        distributed.on_main(lambda: self._open(config, settings, done))
        if distributed.is_main and "console" in config.logger:
            on_gpu, validated = distributed.device.type == "cuda", (progress.metric, progress.value)
            self._console = Console(steps, done, shows_bars(config, distributed), on_gpu, validated)

    def _open(self, config: TrainerConfig, settings: dict[str, Any], done: int) -> None:
        directory = Path(config.output_dir)
        self._file, last = open_metrics(directory / "metrics.jsonl", done)
        content = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()
        if not (path := directory / SETTINGS_FILE).is_file() or path.read_bytes() != content:
            with whole_file(path, "wb") as file:
                file.write(content)
        names = [name for name in config.logger if name in TRACKERS]
        if not names:
            return
        id_file = directory / ID_FILE
        self._is_new = not done or not id_file.is_file()
        if self._is_new:
            with whole_file(id_file) as file:
                file.write(secrets.token_hex(4))
        run = TrackedRun(
            directory=directory,
            project=config.project_name,
            name=config.experiment_name,
            id=id_file.read_text(),
            settings=settings,
            done=done,
            sent=0 if self._is_new else last,
        )
        try:
            for name in names:
                self._trackers[name] = TRACKERS[name](run)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self._console is not None:
            self._console.close()
        if self._file is not None:
            self._file.close()
        limit = {None: None, SystemExit: STOPPED_SECONDS}.get(error[0], FAILED_SECONDS)
        failed = error[0] is not None
        close = threading.Thread(target=self._each, args=(lambda each: each.close(failed=failed),), daemon=True)
        close.start()
        close.join(limit)  # without a network wandb takes minutes

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step.

        Raises:
            OSError: metrics.jsonl cannot be written.
        """
        if self._file is not None:
            numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._file.append({"step": step, **numbers})
        self._each(lambda tracker: tracker.log(step, metrics))
        if self._console is not None:
            self._console.log(step, metrics)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the progress bar's rate."""
        yield
        if self._console is not None:
            self._console.unpause()

    def print(self, line: str) -> None:
        """Print a line on the console, if it is a logger."""
        if self._console is not None:
            write(line)

    def log_text(self, name: str, text: str) -> None:
        """Send a text on the run to trackers that do not have it yet."""
        if self._is_new:
            self._each(lambda tracker: tracker.text(name, text))

    def log_samples(self, step: int, samples: Sequence[ValSample]) -> None:
        """Print the sampled answers of a validation, and send them to the trackers as the table `val/samples`."""
        for number, sample in enumerate(samples, 1):
            parts = [f"{name}:\n{indent(text, '  ')}" for name, text in sample._asdict().items()]
            self.print("\n".join([f"step {step}, validation sample {number} of {len(samples)}", *parts]))
        if samples:
            self._each(lambda tracker: tracker.table(step, samples))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        """Call a function with each tracker. After an error a tracker gets no more; the run goes on."""
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._trackers[name]
                write(f"{name} gets no more of this run ({error}); metrics.jsonl does")
