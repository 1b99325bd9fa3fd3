"""Sweeps: a table of all jobs ends them.

Hydra's sweeper chooses the jobs and its launcher starts them. A job of train.py is one run on all devices of a machine.
A job's directory holds the files of the run, its status (`job.json`), and the output of train.py (`output.log`).
"""

import csv
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from data.storage import read_object, read_records, whole_file, write_object, writing
from data.terminal import print_stderr, table
from launch import ROOT

PR_SET_PDEATHSIG = 1
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SCORES = ("exact_match", "nfe", "tokens_per_forward", "tokens_per_second")  # of a task in evaluation.json
JOB = {"job": int, "overrides": list, "seconds": int | float | None, "error": str | None}  # fields of job.json
ERROR = re.compile(r"\b\w*error: .+(\n  .+)*", re.IGNORECASE)  # further lines are indented


class Sweep(Callback):
    """Hydra calls it before the first job, in the process of the user's command."""

    directory: ClassVar[Path | None] = None  # of the sweep that this process runs
    started: ClassVar[float] = 0.0  # seconds since the epoch

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        Sweep.directory, Sweep.started = Path(config.hydra.sweep.dir), time.time()


@contextmanager
def recorded() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Record the job that runs in the block in `job.json` of its directory.

    Yields:
        The directory, and the record, in which the block replaces `error`.
    """
    hydra, start = HydraConfig.get(), time.perf_counter()
    directory = Path(hydra.runtime.output_dir)
    given = {
        "overrides": list(hydra.overrides.task),
        "config_dirs": [each.path for each in hydra.runtime.config_sources if each.provider == "command-line"],
    }
    job = {"job": hydra.job.num, **given, "exit_code": None, "seconds": None, "error": "did not finish"}
    write_object(directory / "job.json", job)
    try:
        yield directory, job
    finally:
        write_object(directory / "job.json", job | {"seconds": round(time.perf_counter() - start)})


def train_job(debug: bool) -> float | None:
    """Run train.py with the overrides of this job on all devices of this machine.

    Returns:
        The first validation metric, such as val/elbo, or train/loss without validation, for a sweeper to minimise. None
        for a failed job: the optuna sweeper counts a failed trial, whereas NaN would end the sweep.
    """
    environment = os.environ | {"PYTHON": sys.executable}
    if not debug:
        environment.pop("HYDRA_FULL_ERROR", None)  # the sweep's own setting
    with recorded() as (directory, job):
        output_dir = QuotedString(str(directory), Quote.single).with_quotes()
        options = [option for path in job["config_dirs"] for option in ("--config-dir", path)]
        # An experiment that is a sweep would start another.
        arguments = [*options, *job["overrides"], "hydra.mode=RUN", f"trainer.output_dir={output_dir}"]
        log = directory / "output.log"
        command = [ROOT / "launch" / "local.sh", ROOT / "train.py", *arguments]
        job["exit_code"], stopped = run_copied(command, environment, log)
        job["error"] = f"stopped by {stopped.name}" if stopped else _cause(job["exit_code"], log)
    if stopped == signal.SIGINT:
        raise KeyboardInterrupt
    if stopped:
        raise SystemExit(128 + stopped)
    metrics = last_metrics(directory)
    validated = [value for name, value in metrics.items() if name.startswith("val/")]
    return None if job["error"] else validated[0] if validated else metrics.get("train/loss")


def _cause(exit_code: int, log: Path) -> str | None:
    """The first error in the output of a failed job, in one line."""
    if not exit_code:
        return None
    found = ERROR.search(log.read_text(errors="replace"))
    return " ".join(found[0].removeprefix("error: ").split()) if found else f"exit code {exit_code}, see {log}"


def run_copied(command: list[str], environment: dict[str, str], log: Path) -> tuple[int, signal.Signals | None]:
    """Run a command; copy its output to stderr and into a file.

    The command leads its own process group and receives each signal once: torchrun does not survive a second signal
    while it ends its ranks. A second signal kills it; its ranks then end by themselves.

    Returns:
        Its exit code, and the signal that this process received meanwhile, if any.

    Raises:
        OSError: the file cannot be written; the command is killed.
    """
    received: list[signal.Signals] = []

    def forward(number: int, _: Any) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL if received else number)
        received.append(signal.Signals(number))

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    settings = {"start_new_session": True, "preexec_fn": _end_with_parent}
    with log.open("wb") as copy, subprocess.Popen(command, env=environment, **settings, **pipes) as process:
        before = {}
        try:
            if threading.current_thread() is threading.main_thread():  # a launcher may run jobs in threads
                before |= {number: signal.signal(number, forward) for number in FORWARDED}
            while piece := process.stdout.read1():  # not by lines: a progress bar is one line
                sys.stderr.buffer.write(piece)
                sys.stderr.flush()
                with writing(log):
                    copy.write(piece)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return process.returncode, received[0] if received else None


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when its parent is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def last_metrics(run: Path) -> dict[str, float | None]:
    """The last values of train/loss and of the validation metrics, and the scores of an evaluation.

    Scores of several tasks are named TASK/SCORE.
    """
    last = {}
    for record in read_records(run / "metrics.jsonl").objects:
        last |= record
    metrics = {name: value for name, value in last.items() if name == "train/loss" or name.startswith("val/")}
    if (evaluation := run / "evaluation.json").exists():
        scores = read_object(evaluation)["scores"]
        for task, values in scores.items():
            prefix = f"{task}/" if len(scores) > 1 else ""
            metrics |= {prefix + name: values[name] for name in SCORES}
    return metrics


def read_jobs(sweep: Path, since: float = 0.0) -> dict[Path, dict[str, Any]]:
    """The job.json of each job by its directory, ordered by number, which jobs of several sweeps share.

    Args:
        since: leave out older jobs, in seconds since the epoch.

    Raises:
        ValueError: a job.json is damaged.
    """
    files = [file for file in sweep.rglob("job.json") if file.stat().st_mtime >= since]
    jobs = {file.parent: read_object(file) for file in sorted(files)}
    for directory, job in jobs.items():
        if wrong := [name for name, kind in JOB.items() if name not in job or not isinstance(job[name], kind)]:
            file = directory / "job.json"
            raise ValueError(f"{file}: {', '.join(wrong)} missing or of the wrong type: no record of a job; delete it")
    return dict(sorted(jobs.items(), key=lambda each: each[1]["job"]))


def results(sweep: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """One row per job of `read_jobs`: number, varied overrides, status, last metrics."""
    jobs = read_jobs(sweep, since)
    every = [job["overrides"] for job in jobs.values()]
    return [
        {"job": job["job"]}
        | dict(each.partition("=")[::2] for each in job["overrides"] if not all(each in other for other in every))
        | {"status": "failed" if job["error"] else "done", "seconds": job["seconds"], "error": job["error"]}
        | last_metrics(directory)
        for directory, job in jobs.items()
    ]


@contextmanager
def reported() -> Iterator[None]:
    """Report a sweep that runs in the block, also after an error. Exit with 1 if a job failed."""
    Sweep.directory, rows = None, []
    try:
        yield
    finally:
        if Sweep.directory and (rows := results(Sweep.directory, Sweep.started)):
            report(rows, Sweep.directory / "results.csv")
    if any(row["error"] for row in rows):
        sys.exit(1)


def write_results(rows: list[dict[str, Any]], file: Path) -> None:
    """Write the rows of `results` as CSV."""
    with whole_file(file) as lines:
        writer = csv.DictWriter(lines, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def report(rows: list[dict[str, Any]], file: Path) -> None:
    """Write results as CSV and print them as a table, then one line for each failed job."""
    write_results(rows, file)
    names = dict.fromkeys(name for row in rows for name in row)
    shown = [name for name in names if name != "error" and not name.startswith("val/nll_t")]
    print(table([shown, *([row.get(name) for name in shown] for row in rows)]))
    print(f"also in {file}; `python -m launch.experiments.sweep {file.parent}` compares and draws them", flush=True)
    for row in rows:
        if row["error"]:
            print_stderr(f"error: job {row['job']}: {row['error']}")
