"""The summary of a sweep, its page, and the commands that the page names."""

import csv
import json
import re
import shlex
from argparse import ArgumentParser

import pytest

from launch.arguments import check_arguments
from launch.experiments import __main__ as experiments
from launch.experiments import page as page_of
from launch.experiments import sweep
from launch.experiments.page import PAGE, split_at
from launch.experiments.sweep import add_options, main, summarise
from tests.launch.experiments.sweeps import write_jobs, write_metrics, write_scores

SWEEP = [(["optim.lr=1e-3", "seed=0"], 2.0), (["optim.lr=2e-3", "seed=0"], None), (["optim.lr=3e-3", "seed=0"], 1.0)]


@pytest.fixture
def page(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text("# Page\n\n<!-- one -->\nold\n<!-- end -->\n\n<!-- two x -->\n<!-- end -->\nlast\n")
    monkeypatch.setattr(sweep, "PAGE", path)
    return path


def options(*arguments):
    parser = ArgumentParser()
    add_options(parser)
    return parser.parse_args(arguments)


def test_a_summary_has_table_verdict_failures_and_a_picture(tmp_path):
    directory = write_jobs(tmp_path / "sweep", SWEEP)
    text = summarise(directory, "COMMAND", options())
    assert text.startswith("`COMMAND` on ")
    assert "3 jobs in 90.0 s" in text
    assert "| 3e-3 | 1 | 1 | 100 | 30 |" in text  # 50 tokens a second for 2 seconds
    assert "Best: `optim.lr=3e-3`" in text
    assert text.splitlines()[-1] == "Job 1 failed: out of luck"
    assert text in (directory / "summary.md").read_text()
    assert (directory / "summary.svg").read_bytes().startswith(b"<?xml")


def test_all_validations(tmp_path):
    directory = write_jobs(tmp_path / "sweep", SWEEP)
    write_metrics(directory / "2", [3.0, 1.0, 2.0])
    assert "`optim.lr=3e-3` overfits after 2 epochs." in summarise(directory, "COMMAND", options("--curves"))


def test_jobs_of_an_array_share_a_number(tmp_path):
    directory = write_jobs(tmp_path / "sweep", [(["optim.lr=1"], 1.0), (["optim.lr=2"], 2.0)])
    for job in "01":
        file = directory / job / "job.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"job": 0}))
    write_metrics(directory / "1", [4.0, 3.0])
    text = summarise(directory, "COMMAND", options("--curves"))
    assert "| 1 | 1 | val/elbo | 1 | 1 | 1 | 1 |" in text
    assert "| 2 | 1 | val/elbo | 3 | 2 | 3 | 2 |" in text


def test_validations_that_are_not_finite_are_left_out(tmp_path):
    directory = write_jobs(tmp_path / "sweep", SWEEP)
    write_metrics(directory / "2", [3.0, None, 2.0])
    assert "`optim.lr=3e-3` does not overfit within 3 epochs." in summarise(directory, "COMMAND", options("--curves"))
    write_metrics(directory / "2", [None, None])
    with pytest.raises(ValueError, match=r"2/metrics\.jsonl: no step has a finite val/elbo"):
        summarise(directory, "COMMAND", options("--curves"))


@pytest.mark.parametrize("content", [{}, {"job": None, "overrides": None, "seconds": "9", "error": None}])
def test_a_damaged_record_of_a_job_is_named(tmp_path, content):
    directory = write_jobs(tmp_path / "sweep", SWEEP)
    (directory / "0" / "job.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"0/job\.json: job, overrides, seconds"):
        summarise(directory, "COMMAND", options())


def test_models_are_scored_if_asked(tmp_path, monkeypatch):
    directory, scored = write_jobs(tmp_path / "sweep", SWEEP), []

    def score(job):
        scored.append(job.name)
        write_scores(job, equations=int(job.name) / 10)

    monkeypatch.setattr(sweep, "score", score)
    assert "`optim.lr=3e-3` with exact_match 20.0 %" in summarise(directory, "COMMAND", options("--evaluate"))
    assert scored == ["0", "2"]
    rows = csv.DictReader((directory / "results.csv").open())
    assert [(row["status"], row["exact_match"]) for row in rows] == [("done", "0.0"), ("failed", ""), ("done", "0.2")]


def test_a_region_of_the_page_is_replaced(tmp_path, page):
    directory = write_jobs(tmp_path / "sweep", SWEEP)
    text = summarise(directory, "COMMAND", options("--readme", "two x"))
    assert page.read_text() == (
        "# Page\n\n<!-- one -->\nold\n<!-- end -->\n\n"
        f"<!-- two x -->\n\n{text}\n\n![two x](two_x.svg)\n\n<!-- end -->\nlast\n"
    )
    assert page.with_name("two_x.svg").is_file()


def test_an_unknown_region_is_refused_first(page, tmp_path):
    with pytest.raises(ValueError, match=r"no region twos x; .*two x"):
        summarise(tmp_path / "nowhere", "COMMAND", options("--readme", "twos x"))


def test_a_directory_without_jobs_ends_in_one_line(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit, match=f"error: {directory}: no sweep"):
            main([str(directory)])


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Run an experiment, with jobs in the place of train.py; returns its exit code and the command of train.py."""
    monkeypatch.chdir(tmp_path)
    commands = []

    def run(jobs, code, *arguments):
        def train(command):
            commands.append(list(map(str, command)))
            directory = next(each for each in command if str(each).startswith("hydra.sweep.dir=")).partition("=")[2]
            write_jobs(tmp_path / directory, jobs)
            return type("Done", (), {"returncode": code})

        monkeypatch.setattr(experiments.subprocess, "run", train)
        with pytest.raises(SystemExit) as ending:
            experiments.main(list(arguments))
        return ending.value.code, commands[-1]

    return run


def test_an_experiment_trains_and_summarises(started, capsys):
    code, command = started(SWEEP, 1, "sweep_lr", "quickstart", "--metric", "val/elbo", "seed=0,1")
    assert code == 1  # a job failed
    assert command[2:4] == ["-m", "experiment=[quickstart,sweep_lr]"]
    assert command[-1] == "seed=0,1"
    assert "`python -m launch.experiments sweep_lr quickstart seed=0,1` on" in capsys.readouterr().out


def test_choices_of_ones_own_are_passed_on(started, capsys, tmp_path):
    (own := tmp_path / "mine" / "experiment").mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\n")
    _, command = started(SWEEP, 1, "--config-dir=mine", "mine", "quickstart")
    assert command[2:5] == ["--config-dir=mine", "-m", "experiment=[quickstart,mine]"]
    assert "`python -m launch.experiments --config-dir=mine mine quickstart` on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep_lrs", "quickstart"], "experiment=sweep_lrs: .*sweep_lr"),
        (["sweep_lr", "quick_start"], "experiment=quick_start: .*quickstart"),
        (["sweep_lr", "quickstart", "optim.lrs=1"], "optim.lrs=1: .*optim.lr"),
        (["ar_vs_diffusion", "quickstart", "task=[gsm8k,math]"], "--metric gsm8k/exact_match"),
        (["sweep_lr", "quickstart", "--readme", "no"], "no region no"),
        (["sweep_lr", "quickstart", "--readme", "end"], "no region end"),
    ],
)
def test_mistakes_are_found_before_the_sweep(arguments, message, monkeypatch):
    monkeypatch.setattr(experiments.subprocess, "run", None)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        experiments.main(arguments)


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_a_missing_package_is_found_before_the_sweep(package, monkeypatch):
    monkeypatch.setattr(experiments.subprocess, "run", None)
    monkeypatch.setattr(page_of, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(SystemExit, match=rf"{package}: pip install 'diffllm\[plot\]'"):
        experiments.main(["sweep_lr", "quickstart"])


def test_an_interrupted_experiment_is_not_summarised(started, capsys):
    assert started(SWEEP, 130, "sweep_lr", "quickstart")[0] == 130
    assert capsys.readouterr().out == ""


SECTIONS = {part.partition("\n")[0]: part for part in PAGE.read_text().split("\n## ")[1:]}
COMMANDS = re.findall(r"^python -m launch\.experiments (.*)$", PAGE.read_text(), re.M)


def test_each_experiment_has_a_section_with_its_command():
    names = {command.split()[0] for command in COMMANDS}
    assert names >= experiments.SWEEPS.keys()
    assert names - SECTIONS.keys() == {"ablate_equations"}  # beside ablate_data
    for name, section in SECTIONS.items():
        [block] = re.findall(r"```bash\n(.*?)```", section, re.S)
        assert all(each in block for each in name.split(", "))
        assert (
            name in ("full", "verify", "countdown3, sudoku4")
            or f"<!-- {name}" in section
            or f"<!-- {name.replace('data', 'equations')} " in section
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_are_accepted(command):
    name, recipe, *settings = shlex.split(command)
    check_arguments([f"experiment=[{recipe},{name}]", *settings])
    if recipe == "quickstart":
        before, after = split_at(f"{name} {recipe}", PAGE)
        assert before
        assert after
