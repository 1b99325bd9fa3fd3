"""Summarise a sweep over seeds: `python -m launch.experiments.sweep multirun/TIME`.

Compares the varied settings; `seed` repeats them. Writes a table and the best settings into summary.md of the
directory, a picture into summary.svg, and new scores into results.csv. Names failed jobs, and leaves them out.
"""

import math
import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from data.quantities import duration_text
from data.storage import read_records, whole_file
from data.terminal import Parser, ending_in_one_line, printable
from diffllm.checkpoint_source import CheckpointSource
from diffllm.loading import decoder_on_meta
from launch.experiments import comparison, curves
from launch.experiments.comparison import Row
from launch.experiments.page import PAGE, check_plot, circumstances, split_at, write_region
from launch.experiments.scoring import score
from launch.sweep import read_jobs, results, write_results


def add_options(parser: ArgumentParser) -> None:
    """Add the options of a summary."""
    parser.add_argument("--metric", help="judges the settings; default: exact_match, or the first validation metric")
    parser.add_argument("--evaluate", action="store_true", help="first score the models on the task of their runs")
    parser.add_argument("--curves", action="store_true", help="compare the validations of all epochs")
    parser.add_argument("--readme", metavar="NAME", help="also write region NAME of launch/experiments/README.md")


def check_options(options: Namespace) -> None:
    """Refuse options that a summary could not follow.

    Raises:
        ValueError: see `check_plot` and `split_at`.
    """
    check_plot()
    if options.readme:
        split_at(options.readme, PAGE)


def summarise(directory: Path, command: str, options: Namespace) -> str:
    """Write the summary of a sweep, and return it.

    Args:
        command: that made the sweep.
        options: of `add_options`.

    Raises:
        ValueError: no job has finished, or see `check_options`, `score` and `compare`.
    """
    check_options(options)
    if not (records := read_jobs(directory)):
        raise ValueError(f"{directory}: no sweep is there, which has a job.json for each job")
    if options.evaluate:
        for job, record in records.items():
            if not record["error"]:
                score(job)
        write_results(results(directory), directory / "results.csv")
    jobs = {str(job.relative_to(directory)): job for job in records}  # jobs of a Slurm array share numbers
    rows = [row | {"job": name} for name, row in zip(jobs, results(directory), strict=True)]
    rows = [row if row["error"] else row | _sizes(jobs[row["job"]]) for row in rows]
    compared = comparison.compare(rows, options.metric)
    kind, content = (curves, [compared, curves.curves(compared, jobs)]) if options.curves else (comparison, [compared])
    seconds = sum(row["seconds"] or 0 for row in rows)
    parts = [
        f"`{command}` on {circumstances()}: {len(rows)} jobs in {duration_text(seconds)}.",
        kind.table(*content),
        kind.verdict(*content),
        *(f"Job {row['job']} failed: {row['error']}" for row in rows if row["error"]),
    ]
    text, picture = "\n\n".join(parts), kind.draw(*content)
    with whole_file(directory / "summary.md") as file:
        file.write(f"{text}\n\n![summary](summary.svg)\n" if picture else f"{text}\n")
    if picture:
        with whole_file(directory / "summary.svg", "wb") as file:
            file.write(picture)
    if options.readme:
        write_region(options.readme, text, picture, "svg", PAGE)
    return text


def _sizes(job: Path) -> Row:
    """Tokens that a job has trained on, without padding, and parameters of the model that it has exported."""
    sizes = {}
    if records := read_records(job / "metrics.jsonl").objects:
        speed = "perf/tokens_per_second", "perf/step_seconds"
        sizes["tokens"] = sum(math.prod(each[name] for name in speed) for each in records if {*speed} <= each.keys())
    if (job / "hf").exists():
        model = decoder_on_meta(CheckpointSource.open(job / "hf"))
        sizes["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return sizes


def main(arguments: list[str]) -> None:
    parser = Parser("launch.experiments.sweep", __doc__)
    parser.add_argument("directory", type=Path, help="of the sweep, such as multirun/TIME")
    add_options(parser)
    with ending_in_one_line():
        options = parser.parse_args(arguments)
        command = f"python -m launch.experiments.sweep {shlex.join(arguments)}"
        print(printable(summarise(options.directory, command, options)))


if __name__ == "__main__":
    main(sys.argv[1:])
