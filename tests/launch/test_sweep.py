"""Sweeps: what a job gets, what the table says, and real ones with every launcher."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import evaluate
from launch import cli, sweep
from tests.conftest import GOLDEN, ROOT
from tests.launch.test_cli import SMALL, assert_one_error, script  # noqa: F401
from tests.trainer.runs import metrics


@pytest.fixture
def local(monkeypatch, tmp_path):
    """Put Python code in the place of local.sh; it knows its `overrides` and the `directory` of its job."""

    def write(code: str) -> None:
        (tmp_path / "launch").mkdir()
        file = tmp_path / "launch" / "local.sh"
        file.write_text(
            f"#!{sys.executable}\nimport json, os, sys\nfrom pathlib import Path\n"
            "from hydra.core.override_parser.overrides_parser import OverridesParser\n"
            "overrides = OverridesParser.create().parse_overrides([each for each in sys.argv[2:] if '=' in each])\n"
            f"directory = Path(overrides[-1].value())\n{code}\n"
        )
        file.chmod(0o755)
        monkeypatch.setattr(sweep, "ROOT", tmp_path)

    return write


def write_job(directory, job, overrides, error=None, lines=()):
    directory.mkdir()
    record = {"job": job, "overrides": overrides, "exit_code": int(bool(error)), "seconds": 9, "error": error}
    (directory / "job.json").write_text(json.dumps(record))
    if lines:
        (directory / "metrics.jsonl").write_text("".join(lines))


def test_results_of_jobs(tmp_path):
    lines = ['{"step": 1, "train/loss": 3.0, "perf/mfu": 0.1}\n', '{"step": 2, "train/loss": 2.0, "val/elbo": 1.5}\n']
    write_job(tmp_path / "10", 10, ["seed=1", "optim.lr=1e-3"], "out of luck", [lines[0], '{"step": 2, "trai'])
    write_job(tmp_path / "2", 2, ["seed=1", "optim.lr=2e-3"], None, lines)
    done, failed = sweep.results(tmp_path)
    assert done == {
        "job": 2, "optim.lr": "2e-3", "status": "done", "seconds": 9, "error": None, "train/loss": 2.0, "val/elbo": 1.5
    }  # fmt: skip
    assert failed == {
        "job": 10, "optim.lr": "1e-3", "status": "failed", "seconds": 9, "error": "out of luck", "train/loss": 3.0
    }  # fmt: skip


def test_jobs_of_an_earlier_sweep_are_left_out(tmp_path):
    for job in (0, 1):
        write_job(tmp_path / str(job), job, [f"seed={job}"])
    os.utime(tmp_path / "1" / "job.json", (1, 1))
    assert [row["job"] for row in sweep.results(tmp_path, since=2)] == [0]


def test_a_sweep_has_no_output_directory(script, local, tmp_path):  # noqa: F811
    local("raise SystemExit('started')")
    code, _, err = script("train.py", "-m", "seed=1,2", "trainer.output_dir=here")
    assert code == 1
    assert "trainer.output_dir=here: " in err
    assert "hydra.sweep.dir" in err


def test_the_table_and_its_file(tmp_path, capsys):
    rows = [
        {"job": 0, "optim.lr": "1e-3", "status": "failed", "seconds": None, "error": "out of luck"},
        {"job": 1, "optim.lr": "2e-3", "status": "done", "seconds": 90, "error": None}
        | {"train/loss": 2.0, "val/nll_t_0": 1},
    ]
    sweep.report(rows, tmp_path / "results.csv")
    out, err = capsys.readouterr()
    assert out.splitlines()[:3] == [
        "job  optim.lr  status  seconds  train/loss",
        "0        1e-3  failed",
        "1        2e-3    done       90           2",
    ]
    assert err == "error: job 0: out of luck\n"
    with (tmp_path / "results.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["error"] for row in read] == ["out of luck", ""]
    assert read[1]["val/nll_t_0"] == "1"


def test_no_two_sweeps_share_a_directory():
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        configs = [compose("config", ["hydra.job.name=x"], return_hydra_config=True) for _ in range(2)]
    assert configs[0].hydra.sweep.dir == configs[0].hydra.sweep.dir
    assert configs[0].hydra.sweep.dir != configs[1].hydra.sweep.dir


def test_a_job_gets_its_overrides_as_they_were_typed(script, local, tmp_path):  # noqa: F811
    local("(directory / 'given').write_text(json.dumps([sys.argv[1:], os.environ.get('HYDRA_FULL_ERROR')]))")
    typed = ["trainer.experiment_name='a, b=[c] \"d\"'", "data.train_files=[a.jsonl,'b, c.jsonl']", "optim.lr=1e-06"]
    where = ["hydra.sweep.dir='here, it\\'s'", "hydra.sweep.subdir=${hydra.job.override_dirname}"]
    code, out, err = script("train.py", *typed, "-m", "seed=1,2", *where)
    assert (code, err) == (0, "")
    given = [json.loads(file.read_text()) for file in sorted((tmp_path / "here, it's").glob("*/given"))]
    for seed, (arguments, debug) in zip((1, 2), given, strict=True):
        assert arguments[:-1] == [str(tmp_path / "train.py"), *typed, f"seed={seed}", "hydra.mode=RUN"]
        assert debug is None  # an error is to be one line
    assert out.splitlines()[-4].split() == ["job", "seed", "status", "seconds"]


def test_an_experiment_may_be_a_sweep(script, local):  # noqa: F811
    """Without -m. Its jobs are no sweeps, and the command line replaces its values."""
    local("(directory / 'given').write_text(json.dumps(sys.argv[2:-1]))")
    code, out, err = script("train.py", "experiment=[quickstart,sweep_lr]", "trainer.total_epochs=1", "seed=0,1")
    assert (code, err) == (0, "")
    [sweep] = Path("multirun").iterdir()
    given = [json.loads((sweep / str(job) / "given").read_text()) for job in range(6)]
    assert given[0] == [
        *("optim.lr=1e-06", "trainer.total_epochs=1", "experiment=[quickstart,sweep_lr]", "seed=0", "hydra.mode=RUN")
    ]
    assert {each[0] for each in given} == {"optim.lr=1e-06", "optim.lr=2e-06", "optim.lr=5e-06"}
    assert f"python -m launch.experiments.sweep {sweep}" in out.splitlines()[-1]


def test_a_job_gets_and_records_choices_of_ones_own(script, local, tmp_path):  # noqa: F811
    local("(directory / 'given').write_text(json.dumps(sys.argv[2:]))")
    (own := tmp_path / "mine" / "experiment").mkdir(parents=True)
    (own / "small.yaml").write_text("# @package _global_\nseed: 3\n")
    code, _, err = script("train.py", "--config-dir=mine", "-m", "experiment=small", "optim.lr=1e-3")
    assert (code, err) == (0, "")
    [job] = (tmp_path / "multirun").glob("*/0")
    assert json.loads((job / "given").read_text())[:2] == ["--config-dir", str(own.parent)]
    assert json.loads((job / "job.json").read_text())["config_dirs"] == [str(own.parent)]


def test_a_failed_job_does_not_stop_the_others(script, local, tmp_path):  # noqa: F811
    local(
        "seed = overrides[0].value()\n"
        "if seed == 1: sys.exit('Traceback\\nerror: out of luck\\nerror: again')\n"
        "if seed == 2: os.kill(os.getpid(), 9)\n"
        "(directory / 'metrics.jsonl').write_text(json.dumps({'train/loss': 2.0, 'val/elbo': 1.5}) + '\\n')\n"
        "print('trained', flush=True)"
    )
    code, out, err = script("train.py", "-m", "seed=1,2,3")
    assert code == 1
    assert "trained" in err
    [directory] = (tmp_path / "multirun").iterdir()
    killed = f"exit code -9, see {directory / '1' / 'output.log'}"
    assert err.splitlines()[-2:] == ["error: job 0: out of luck", f"error: job 1: {killed}"]
    rows = [line.split() for line in out.splitlines()[-5:-1]]
    assert rows[0] == ["job", "seed", "status", "seconds", "train/loss", "val/elbo"]
    assert [row[2] for row in rows[1:]] == ["failed", "failed", "done"]
    assert rows[3][4:] == ["2", "1.5"]
    assert json.loads((directory / "1" / "job.json").read_text())["exit_code"] == -9


def test_the_other_scripts_do_not_start_processes(script, local):  # noqa: F811
    local("raise AssertionError")
    code, _, err = script("sample.py", "-m", "sampling.seed=1,2", "prompt=Hi")
    assert code == 1
    for job, line in enumerate(err.splitlines()):
        assert line.startswith(f"error: job {job}: model.path is not given")


def test_a_sweep_of_evaluations(script, monkeypatch, tmp_path):  # noqa: F811
    """A mistake and a bug fail their jobs only."""
    seen = []

    def evaluated(config):
        seen.append(config.sampling.steps)
        if config.sampling.steps == 2:
            raise RuntimeError("out of memory\nmore")
        scores = {"questions": 2, "exact_match": 0.5, "nfe": 3.0, "tokens_per_forward": 1.5, "tokens_per_second": 9.0}
        (Path(config.trainer.output_dir) / "evaluation.json").write_text(json.dumps({"scores": {"equations": scores}}))

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    code, out, err = script("evaluate.py", "-m", "sampling.steps=0,2,8", f"model.path={GOLDEN / 'dream_tiny'}")
    assert (code, seen) == (1, [2, 8])
    [directory] = (tmp_path / "multirun").iterdir()
    with (directory / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["failed", "failed", "done"]
    assert [row["error"] for row in rows] == ["sampling.steps=0: must be at least 1", "out of memory", ""]
    done = {name: value for name, value in rows[2].items() if name not in ("seconds", "error")}
    assert done == {
        "job": "2", "sampling.steps": "8", "status": "done",
        "exact_match": "0.5", "nfe": "3.0", "tokens_per_forward": "1.5", "tokens_per_second": "9.0",
    }  # fmt: skip
    assert out.splitlines()[-2].split() == ["2", "8", "done", rows[2]["seconds"], "0.5", "3", "1.5", "9"]
    assert err.count("Traceback") == 1


def test_scores_of_several_tasks_are_named_by_them(tmp_path):
    scores = {"exact_match": 0.5, "nfe": 3.0, "tokens_per_forward": None, "tokens_per_second": None}
    (tmp_path / "evaluation.json").write_text(json.dumps({"scores": {"a": scores, "b": scores}}))
    metrics = sweep.last_metrics(tmp_path)
    assert metrics == {f"{task}/{name}": value for task in "ab" for name, value in scores.items()}


def test_an_interrupted_sweep_of_evaluations(script, monkeypatch):  # noqa: F811
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    code, out, _ = script("evaluate.py", "-m", "sampling.steps=1,2")
    assert code == 130
    assert [line.split()[1] for line in out.splitlines()[-2:-1]] == ["failed"]


@pytest.mark.parametrize("choice", ["hydra/launcher=joblibb", "hydra/sweeper=optun"])
def test_what_is_not_installed_is_refused(script, choice, tmp_path):  # noqa: F811
    assert_one_error(script("train.py", "-m", choice, "seed=1,2"), choice, "basic", "pip install 'diffllm[sweep]'")
    assert not (tmp_path / "multirun").exists()


def test_a_sweeper_may_draw_from_an_interval():
    cli.check_arguments(["optim.lr=tag(log,interval(1e-6,1e-4))"])


OPTUNA = "hydra/sweeper=optuna hydra.sweeper.n_trials=3 hydra.sweeper.n_jobs=1 hydra/sweeper/sampler=random"
WAYS = {
    "basic": ("hydra", ""),
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "hydra/launcher=joblib hydra.launcher.n_jobs=2"),
    "submitit": ("hydra_plugins.hydra_submitit_launcher", "hydra/launcher=submitit_local"),
    # With this seed it draws each of three choices once.
    "optuna": ("hydra_plugins.hydra_optuna_sweeper", f"{OPTUNA} hydra.sweeper.sampler.seed=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "ranks"), [*((way, 1) for way in WAYS), ("basic", 2)])
def test_sweeps(way, ranks, tmp_path):
    plugin, choices = WAYS[way]
    pytest.importorskip(plugin, reason=f"{plugin} is not installed")
    settings = [setting for setting in SMALL if "batch_size" not in setting] + ["data.micro_batch_size_per_gpu=2"]
    command = [sys.executable, ROOT / "train.py", "-m", *choices.split(), *settings, "data.train_batch_size=8,7,4"]
    environment = os.environ | {"RANKS": str(ranks)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    [directory] = (tmp_path / "multirun").iterdir()
    with (directory / "results.csv").open() as file:
        rows = {row["data.train_batch_size"]: row for row in csv.DictReader(file)}
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: job")]
    assert error.startswith(f"error: job {rows['7']['job']}: data.train_batch_size=7, data.micro_batch_size_per_gpu=2")
    assert f"ranks={ranks}" in error
    assert {size: row["status"] for size, row in rows.items()} == {"8": "done", "7": "failed", "4": "done"}
    for size in ("8", "4"):
        run = directory / rows[size]["job"]
        assert (run / "hf" / "model.safetensors").is_file()
        assert float(rows[size]["val/elbo"]) == metrics(run)[-1]["val/elbo"]
    if way == "optuna":
        best = OmegaConf.load(directory / "optimization_results.yaml").best_value
        assert best == min(float(rows[size]["val/elbo"]) for size in ("8", "4"))
