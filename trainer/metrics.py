"""Log metrics to metrics.jsonl, the console, wandb and tensorboard, and sampled answers to the last three."""

import json
import math
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

from tqdm import tqdm

from data.storage import AppendedRecords, read_records, whole_file
from data.terminal import printable
from trainer.config import TrainerConfig
from trainer.distributed import Distributed

WANDB_SECONDS = 20  # timeout of wandb when a run starts
SHOWN = 3  # validation metrics on the console
FINISH_SECONDS = 4  # timeout of wandb when a run has failed


class ValSample(NamedTuple):
    """A validation row as text."""

    prompt: str
    response: str  # sampled answer
    reference: str  # the row's first answer


def open_metrics(path: Path, done: int) -> AppendedRecords:
    """Open metrics.jsonl, one line a step, to append after step `done`.

    The first appended line replaces the lines of later steps. A run that fails before it leaves the file unchanged.

    Raises:
        ValueError: a line of the file is broken; the message names it.
    """
    records = read_records(path)
    for record in records.objects:
        if not isinstance(record.get("step"), int):
            raise ValueError(f"{path} has a line without a step: {json.dumps(record)[:80]}; delete that line")
    kept = [end for record, end in zip(*records, strict=True) if record["step"] <= done]
    return AppendedRecords(path, kept[-1] if kept else 0)


class MetricsLog:
    """Logs the metrics of each step on rank 0. Collective to make.

    A resumed run continues its wandb run.

    Raises:
        ValueError: a broken metrics.jsonl, wandb that cannot be reached, or no tensorboard.
    """

    def __init__(
        self, config: TrainerConfig, settings: dict[str, Any], done: int, steps: int, distributed: Distributed
    ):
        self._file = self._bar = self._wandb = self._tensorboard = None
        distributed.on_main(lambda: self._open(config, settings, done))
        if distributed.is_main and "console" in config.logger:
            self._bar = tqdm(total=steps, initial=done, desc="train", unit="step", dynamic_ncols=True)

    def _open(self, config: TrainerConfig, settings: dict[str, Any], done: int) -> None:
        directory = Path(config.output_dir)
        self._file = open_metrics(directory / "metrics.jsonl", done)
        if "tensorboard" in config.logger:
            self._tensorboard = _tensorboard(directory / "tensorboard", done)
        if "wandb" in config.logger:
            self._wandb = _wandb_run(config, settings, directory, done)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        ended, failed = error[0] is None, error[0] not in (None, SystemExit)
        finish = threading.Thread(
            target=self._with_wandb, args=(lambda run: run.finish(exit_code=int(not ended)),), daemon=True
        )
        finish.start()
        finish.join(FINISH_SECONDS if failed else None)  # without a network wandb takes minutes

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step.

        Raises:
            OSError: metrics.jsonl cannot be written.
        """
        if self._file is not None:
            numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._file.append({"step": step, **numbers})
        for name, value in metrics.items() if self._tensorboard is not None else ():
            self._tensorboard.add_scalar(name, value, step)
        self._with_wandb(lambda run: run.log(metrics, step=step))
        if self._bar is not None:
            loss, speed = metrics["train/loss"], metrics["perf/tokens_per_second"]
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
            self._bar.update()
            validated = [f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith("val/")]
            if validated:
                self._bar.write(f"step {step}: train/loss {loss:.4g}, {', '.join(validated[:SHOWN])}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the progress bar's rate."""
        yield
        if self._bar is not None:
            self._bar.unpause()

    def print(self, line: str) -> None:
        """Print a line above the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.write(printable(line))

    def log_samples(self, step: int, samples: Sequence[ValSample]) -> None:
        """Print the sampled answers of a validation, and send them to wandb as the table `val/samples`."""
        for number, sample in enumerate(samples, 1):
            parts = [f"{name}:\n{indent(text, '  ')}" for name, text in sample._asdict().items()]
            text = "\n".join([f"step {step}, validation sample {number} of {len(samples)}", *parts])
            tqdm.write(printable(text))
            if self._tensorboard is not None:
                self._tensorboard.add_text(f"val/sample_{number}", "\n\n".join(parts), step)
        if samples:
            self._with_wandb(lambda run: run.log({"val/samples": _wandb_table(step, samples)}, step=step))

    def _with_wandb(self, call: Callable[[Any], None]) -> None:
        """Call a function with the wandb run. Errors only end the logging: wandb's own process may be gone."""
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:
            self._wandb = None
            print(printable(f"wandb gets no more of this run ({error}); metrics.jsonl does"), flush=True)


def _tensorboard(directory: Path, done: int) -> Any:
    """Writer of tensorboard's event files, which hides the steps of an earlier process after `done`.

    Raises:
        ValueError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("trainer.logger=[tensorboard] needs it: pip install 'diffllm[tensorboard]'") from error
    return SummaryWriter(directory, purge_step=done + 1)


def _wandb_table(step: int, samples: Sequence[ValSample]) -> Any:
    import wandb  # slow to import, and rarely needed

    return wandb.Table(["step", *ValSample._fields], [[step, *sample] for sample in samples])


def _wandb_run(config: TrainerConfig, settings: dict[str, Any], directory: Path, done: int) -> Any:
    """Start or continue the wandb run of this directory.

    Raises:
        ValueError: wandb has no key or does not answer.
    """
    import wandb  # slow to import, and rarely needed

    id_file = directory / "wandb_id"
    if not done or not id_file.is_file():
        with whole_file(id_file) as file:
            file.write(secrets.token_hex(4))
    try:
        return wandb.init(
            project=config.project_name,
            name=config.experiment_name,
            id=id_file.read_text(),
            resume="allow",
            dir=directory,
            config=settings,
            settings=wandb.Settings(init_timeout=WANDB_SECONDS),
        )
    except wandb.Error as error:
        wandb.teardown(exit_code=1)  # it prints its last lines before the error
        reason = " ".join(str(error).split())
        raise ValueError(
            f"trainer.logger={config.logger}: wandb cannot be used ({reason}). `wandb login` gives it a key; "
            "WANDB_MODE=offline keeps the run on disk for `wandb sync`; trainer.logger=[console] does without"
        ) from error
