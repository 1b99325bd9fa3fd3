"""What a terminal and a log file show of a run."""

import os
import pty
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.trainer.runs import train
from trainer import console
from trainer.config import TrainerConfig
from trainer.console import Console, shows_bars
from trainer.distributed import Distributed

LINE = re.compile(r"^step (\d+) of (\d+): loss \d+\.\d{4}, (?:val/elbo (\S+), .*)?[\d,]+ tokens/s(, .+ left)?$", re.M)


def step(loss: float = 2.0, **more: float) -> dict[str, float]:
    return {"train/loss": loss, "perf/tokens_per_second": 1234.0, "perf/memory_gib": 12.34, **more}


def lines(out: str) -> dict[int, str | None]:
    """The validation of each plain line, by step."""
    return {int(found[1]): found[3] for found in LINE.finditer(out)}


def test_a_log_has_plain_lines(small_run, capsys):
    train(small_run(trainer__logger=["console"], trainer__max_steps=40, trainer__val_check_interval=15))
    out, err = capsys.readouterr()
    assert "\r" not in out + err
    shown = lines(out)
    assert list(shown) == [*(4, 8, 12, 15, 16, 20, 24, 28, 30, 32, 36, 40)]
    assert [number for number, validated in shown.items() if validated] == [15, 30, 40]
    assert [found[4] is None for found in LINE.finditer(out)] == [False] * 11 + [True]  # nothing is left


def test_without_the_console_a_run_prints_no_step(small_run, capsys):
    train(small_run(trainer__max_steps=2))
    assert lines(capsys.readouterr().out) == {}


@pytest.mark.parametrize("steps", [1, 3, 10, 11, 999])
def test_a_line_each_tenth(steps, capsys):
    shown = Console(steps, 0, False, False, (None, None))
    for number in range(1, steps + 1):
        shown.log(number, step())
    numbers = list(lines(capsys.readouterr().out))
    assert len(numbers) == min(steps, 10)
    assert numbers[-1] == steps


def test_a_long_tenth_has_more_lines(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    shown = Console(10_000, 0, False, False, (None, None))
    for number in range(1, 101):
        now[0] += 30
        shown.log(number, step())
    found = re.findall(r"^step (\d+) of 10,000: .*, (\S+ \S+) left$", capsys.readouterr().out, re.M)
    assert found[0] == ("21", "83.2 hours")
    assert [int(number) for number, _ in found] == [21, 42, 63, 84]


def on_terminal(config: TrainerConfig, monkeypatch, tty: bool = True, rank: int = 0) -> bool:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty, raising=False)
    return shows_bars(config, Distributed(rank, 2, None))


def test_who_shows_bars(monkeypatch):
    assert on_terminal(TrainerConfig(), monkeypatch)
    assert not on_terminal(TrainerConfig(), monkeypatch, tty=False)
    assert not on_terminal(TrainerConfig(), monkeypatch, rank=1)
    assert not on_terminal(TrainerConfig(progress=False), monkeypatch)
    assert not on_terminal(TrainerConfig(logger=["wandb"]), monkeypatch)


def test_the_bar_and_the_lines_above_it(capsys):
    shown = Console(4, 1, True, True, ("val/elbo", 3.5))
    shown.log(2, step())
    assert shown._bar.postfix == "loss 2.0000, val/elbo 3.5, 1,234 tokens/s, GPU 12.3 GiB"
    shown.log(3, step(**{"val/elbo": 2.5, "val/other": 1.0}))
    shown.log(4, step())
    assert shown._bar.postfix == "loss 2.0000, val/elbo 2.5, 1,234 tokens/s, GPU 12.3 GiB"
    assert shown._bar.n == 4
    shown.close()
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert line.startswith("step 3 of 4: loss 2.0000, val/elbo 2.5, val/other 1, 1,234 tokens/s, GPU 12.3 GiB, ")


CODE = """
from trainer.console import Console, write
shown = Console(3, 0, True, False, (None, None))
for number in range(1, 4):
    shown.log(number, {"train/loss": 1.0, "perf/tokens_per_second": 2.0} | ({"val/elbo": 0.5} if number == 2 else {}))
shown.close()
"""


def test_on_a_terminal():
    ours, theirs = pty.openpty()
    command = ["sh", "-c", 'stty rows 24 cols 100; exec "$0" -c "$1"', sys.executable, CODE]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT) as process:
        os.close(theirs)
        out = b""
        try:
            while piece := os.read(ours, 4096):
                out += piece
        except OSError:  # the terminal is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    last = out.decode().replace("\r\n", "\n").rstrip().rpartition("\r")[2]
    assert re.fullmatch(r"train: 100%\|█+\| 3/3 \[.*, loss 1\.0000, val/elbo 0\.5, 2 tokens/s\]", last)
    assert "\nstep 2 of 3: loss 1.0000, val/elbo 0.5, 2 tokens/s" in out.decode().replace("\r", "\n")
