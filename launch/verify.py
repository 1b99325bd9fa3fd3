"""Check whether a run would work: `python -m launch.verify experiment=quickstart`.

Prints a line for each check, and below a red one what to do. Writes nothing but the cache of tokenized rows.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from textwrap import fill

import torch
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from data.storage import first_line
from data.terminal import printable
from launch.checks import CHECKS
from launch.checks.base import Check, Result, Run, fail, skip
from launch.cli import EXPECTED, describe, quiet_libraries, user_errors
from launch.settings import read_settings, whole_number
from trainer.config import Config
from trainer.distributed import check_alone, init_distributed
from trainer.memory import remedies

STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red", "skip": "dim"}
OWN = ("tokens", "train")  # settings
NAME = max(map(len, CHECKS)) + 1
HELP = """python -m launch.verify [NAME=VALUE …] checks whether a training run would work on this machine.

It takes the choices and settings of train.py (python train.py --help), and

  tokens=N     positions of a row that are shown token by token; default 60, 0 shows all
  train=false  tries no gradient and no steps on few rows, which take the memory of training

  python -m launch.verify experiment=quickstart
  python -m launch.verify experiment=lora model.path=DIR data.train_files=rows.jsonl tokens=0

A check prints ok, warn, FAIL, or skip with the reason. "help:" names a symptom under "Questions" in trainer/README.md.
The exit code is 1 if a check fails, else 0. The checks are

{}"""


def verify(arguments: list[str]) -> bool:
    """Check the run of a command line. Return whether no check has failed.

    Raises:
        ValueError: several ranks, an unknown setting or a wrong value.
    """
    check_alone("launch.verify", "python -m launch.verify")
    values, config, choice = _read(arguments)
    tokens = whole_number("tokens", values.get("tokens"), Run.tokens)
    if (train := values.get("train", "true")) not in ("true", "false"):
        raise ValueError(f"train={train}: must be true or false")
    console, counts = Console(highlight=False), Counter()
    with init_distributed() as distributed:
        run = Run(config, choice, distributed, tokens, train == "true")
        for name, symptom, result in run_checks(run):
            counts[result.status] += 1
            _print(console, name, symptom, result)
    console.print("\n" + ", ".join(f"{counts[status]} {status}" for status in STYLES if counts[status]))
    if not counts["FAIL"]:
        settings = [argument for argument in arguments if argument.partition("=")[0] not in OWN]
        console.print(f"next: launch/local.sh train.py {shlex.join(settings)}", markup=False, soft_wrap=True)
    return not counts["FAIL"]


def _read(arguments: list[str]) -> tuple[dict[str, str], Config, str]:
    """Settings of the command line, with the sampling that the checkpoint recommends if it can be read."""
    plain = read_settings(arguments, OWN)
    try:
        return read_settings(arguments, OWN, recommended=set())
    except ValueError:  # of the checkpoint, which the checks report
        return plain


def run_checks(run: Run) -> Iterator[tuple[str, str, Result]]:
    """Yield the name of each check, the symptom that it explains, and its results, as soon as each is known.

    A check is skipped if one that it needs has failed or was skipped.
    """
    passed = set()
    for name, check in CHECKS.items():
        if missing := [need for need in check.needs if need not in passed]:
            yield name, check.symptom, skip(f"needs {', '.join(missing)}")
            continue
        statuses = set()
        for symptom, result in results_of(check, run):
            statuses.add(result.status)
            yield name, symptom, result
        if statuses <= {"ok", "warn"}:
            passed.add(name)


def results_of(check: Check, run: Run) -> Iterator[tuple[str, Result]]:
    """Results of a check; an expected error becomes one."""
    try:
        for result in check.function(run):
            yield check.symptom, result
    except torch.OutOfMemoryError as error:
        advice = f"what may help: {', '.join(remedies(run.config, run.layout))}"
        yield CHECKS["memory"].symptom, fail(first_line(error), advice)
    except (*EXPECTED, RuntimeError) as error:  # RuntimeError: of torch, its kernels and the driver
        yield check.symptom, fail(describe(error))


def _print(console: Console, name: str, symptom: str, result: Result) -> None:
    line = Text.assemble((f"{result.status:<4}", STYLES[result.status]), f"  {name:<{NAME}} {printable(result.text)}")
    console.print(line, soft_wrap=True)
    if result.status in ("warn", "FAIL"):
        advice = " ".join(filter(None, (result.advice and f"{printable(result.advice)};", f"help: {symptom}")))
        console.print(Text(f"{'':<{NAME + 7}}→ {advice}"), soft_wrap=True)
    if result.details is not None:
        console.print(Padding(result.details, (0, 0, 0, NAME + 7)))


def explanations() -> str:
    """Each check with what it finds out, as indented lines."""
    lines = (f"  {name:<{NAME}} {check.function.__doc__.splitlines()[0]}" for name, check in CHECKS.items())
    return "\n".join(fill(line, 118, subsequent_indent=" " * (NAME + 3)) for line in lines)


def main(arguments: list[str]) -> bool:
    """Check the run of a command line, or print the help. Return whether no check has failed."""
    if {"-h", "--help"} & {*arguments}:
        print(HELP.format(explanations()))
        return True
    quiet_libraries()
    return verify(arguments)


if __name__ == "__main__":
    with user_errors(debug=False):
        sys.exit(0 if main(sys.argv[1:]) else 1)
