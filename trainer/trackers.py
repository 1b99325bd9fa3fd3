"""Trackers, which show runs side by side: wandb, tensorboard and trackio.

All get the same metrics under the same names, the settings, texts on the run, and a table of sampled answers at each
validation. A run that resumes continues its run in each of them.
"""

import html
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple, Protocol

import yaml

WANDB_SECONDS = 20  # timeout of wandb when a run starts


class ValSample(NamedTuple):
    """A validation row as text."""

    prompt: str
    response: str  # sampled answer
    reference: str  # the row's first answer


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows.

    Attributes:
        id: the same for all processes of a run.
        done: step that this process resumes after.
        sent: last step that an earlier process has sent; 0 for a run that is new to the trackers.
    """

    directory: Path
    project: str
    name: str
    id: str
    settings: dict[str, Any]
    done: int
    sent: int


class Tracker(Protocol):
    """Gets what a run measures. Made from a `TrackedRun`, with a ValueError if it cannot be used."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Add the metrics of a step."""

    def table(self, step: int, samples: Sequence[ValSample]) -> None:
        """Add the sampled answers of a validation as the table `val/samples`."""

    def text(self, name: str, text: str) -> None:
        """Add a text on the run."""

    def close(self, failed: bool) -> None:
        """Send the rest."""


class TensorBoard:
    """Event files in `tensorboard/` of the run. Hides repeated steps of an earlier process.

    Raises:
        ValueError: the extra is not installed.
    """

    def __init__(self, run: TrackedRun):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._writer = SummaryWriter(run.directory / "tensorboard", purge_step=run.done + 1)
        if not run.sent:
            self.text("run/settings", yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def table(self, step: int, samples: Sequence[ValSample]) -> None:
        head = "".join(f"<th>{name}</th>" for name in ValSample._fields)
        rows = ("".join(f"<td>{_preformatted(text)}</td>" for text in sample) for sample in samples)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        self._writer.add_text("val/samples", f"<table><tr>{head}</tr>{body}</table>", step)

    def text(self, name: str, text: str) -> None:
        self._writer.add_text(name, _preformatted(text), 0)

    def close(self, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """A run of wandb, offline with WANDB_MODE=offline.

    Raises:
        ValueError: wandb has no key or does not answer.
    """

    def __init__(self, run: TrackedRun):
        import wandb  # slow to import, and rarely needed

        self._wandb, self._sent = wandb, run.sent
        try:
            self._run = wandb.init(
                project=run.project,
                name=run.name,
                id=run.id,
                resume="allow",
                dir=run.directory,
                config=run.settings,
                settings=wandb.Settings(init_timeout=WANDB_SECONDS),
            )
        except wandb.Error as error:
            wandb.teardown(exit_code=1)  # it prints its last lines before the error
            raise _unusable(
                "wandb",
                error,
                "`wandb login` gives it a key; WANDB_MODE=offline keeps the run on disk for `wandb sync`",
            ) from error

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        if step > self._sent:  # wandb takes no step twice
            self._run.log(metrics, step=step)

    def table(self, step: int, samples: Sequence[ValSample]) -> None:
        rows = [[step, *sample] for sample in samples]
        self.log(step, {"val/samples": self._wandb.Table(["step", *ValSample._fields], rows)})

    def text(self, name: str, text: str) -> None:
        self._run.log({name: self._wandb.Html(_preformatted(text), inject=False)}, step=0)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, in the database of TRACKIO_DIR, or sent to TRACKIO_SERVER_URL or TRACKIO_SPACE_ID.

    Raises:
        ValueError: the extra is not installed, or trackio cannot be used.
    """

    def __init__(self, run: TrackedRun):
        if find_spec("trackio") is None:
            raise _missing("trackio")
        import trackio

        self._trackio, self._sent = trackio, run.sent
        advice = "TRACKIO_DIR names the directory of its database, TRACKIO_SERVER_URL or TRACKIO_SPACE_ID a server"
        try:
            with warnings.catch_warnings(record=True) as caught, _writable(trackio.utils.TRACKIO_DIR):
                warnings.simplefilter("always")
                # In a context of its own: trackio would finish its current run once more at exit.
                self._run = copy_context().run(
                    trackio.init,
                    run.project,
                    name=f"{run.name}-{run.id}",  # trackio finds a run to resume by its name
                    resume="allow",
                    config=run.settings,
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
            # Trackio warns about a server that does not answer, and goes on.
            if failed := [each.message for each in caught if str(each.message).startswith("trackio.init() could not")]:
                raise failed[0]
        except Exception as error:  # of its database, of HTTP, or a name that it does not take
            raise _unusable("trackio", error, advice) from error

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        if step > self._sent:  # trackio would show a step twice
            self._run.log(metrics, step=step)

    def table(self, step: int, samples: Sequence[ValSample]) -> None:
        rows = [[step, *sample] for sample in samples]
        self.log(step, {"val/samples": self._trackio.Table(["step", *ValSample._fields], rows)})

    def text(self, name: str, text: str) -> None:
        self._run.log({name: self._trackio.Markdown(f"```\n{text}\n```")}, step=0)

    def close(self, failed: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}


@contextmanager
def _writable(directory: Path) -> Iterator[None]:
    """Run the block if files can be written to a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=directory):
        yield


def _missing(extra: str) -> ValueError:
    return ValueError(f"trainer.logger=[{extra}] needs it: pip install 'diffllm[{extra}]'")


def _unusable(name: str, error: Exception, advice: str) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(
        f"trainer.logger=[{name}]: {name} cannot be used ({reason}). {advice}; trainer.logger=[console] does without"
    )


def _preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"
