"""Sweeps as train.py leaves them."""

import json
from pathlib import Path


def write_jobs(directory: Path, jobs: list[tuple[list[str], float | None]], metric: str = "val/elbo") -> Path:
    """Finished jobs by their overrides and last value of a metric; None for a failed job."""
    for number, (overrides, value) in enumerate(jobs):
        job = directory / str(number)
        job.mkdir(parents=True)
        error = "out of luck" if value is None else None
        record = {
            "job": number,
            "overrides": overrides,
            "config_dirs": [],
            "exit_code": 0,
            "seconds": 30,
            "error": error,
        }
        (job / "job.json").write_text(json.dumps(record))
        if value is not None:
            write_metrics(job, [value], metric)
    return directory


def write_metrics(job: Path, values: list[float], metric: str = "val/elbo") -> None:
    """One validation an epoch."""
    speed = {"perf/tokens_per_second": 50.0, "perf/step_seconds": 2.0, "train/loss": 1.0}
    records = [{"step": n, "train/epoch": float(n), metric: value} | speed for n, value in enumerate(values, start=1)]
    (job / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_scores(job: Path, **exact_match: float) -> None:
    """An evaluation by its tasks."""
    scores = {
        task: {"exact_match": value, "nfe": 1.0, "tokens_per_forward": 1.0, "tokens_per_second": 9.0}
        for task, value in exact_match.items()
    }
    (job / "evaluation.json").write_text(json.dumps({"scores": scores}))
