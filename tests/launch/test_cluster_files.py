"""Cluster files of launch/, as far as they can be checked without a cluster."""

import os
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from launch.arguments import check_arguments
from tests.conftest import ROOT

SKYPILOT, TRAINJOB = ROOT / "launch" / "skypilot.yaml", ROOT / "launch" / "trainjob.yaml"
PRINT_ARGUMENTS = 'printf "%s\\n" "$@"'
RUN_ARGUMENTS = '[ "$1" = --cpus-per-task=4 ] && shift && exec "$@"'


class Script:
    """A bash script whose commands are stand-ins, in an environment of its own."""

    def __init__(self, home: Path, **environment: str):
        self.home = home
        self.environment = {"HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}", **environment}
        (home / "bin").mkdir()
        (home / "venv").symlink_to(home)

    def stand_in(self, name: str, body: str) -> None:
        command = self.home / "bin" / name
        command.write_text(f"#!/usr/bin/env bash\n{body}\n")
        command.chmod(0o755)

    def start(self, *command: str | Path) -> subprocess.Popen:
        return subprocess.Popen(["bash", *command], env=self.environment, stdout=subprocess.PIPE, text=True)

    def run(self, *command: str | Path) -> tuple[int, str]:
        process = self.start(*command)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output


@pytest.fixture
def slurm(tmp_path) -> Script:
    """slurm.sbatch on the first of two nodes; `scontrol requeue` writes its arguments to requeued.txt."""
    script = Script(tmp_path, SLURM_JOB_ID="7", SLURM_NNODES="2", SLURM_CPUS_PER_TASK="4")
    script.stand_in("python", PRINT_ARGUMENTS)
    script.stand_in("srun", RUN_ARGUMENTS)
    script.stand_in("scontrol", job_shown("None"))
    return script


def job_shown(preempted: str) -> str:
    shown = f"PreemptEligibleTime=2030-01-01T00:00:00 PreemptTime={preempted}"
    return f'if [ "$1" = requeue ]; then echo "$2" > ~/requeued.txt; else echo "JobId=$3"; echo "   {shown}"; fi'


def torchrun(arguments: list[str]):
    """A command line of torchrun, as itself reads it, after the checks of what it starts."""
    parsed = get_args_parser().parse_args(arguments)
    assert (ROOT / parsed.training_script).is_file()
    assert parsed.training_script_args
    check_arguments(parsed.training_script_args)
    assert (parsed.rdzv_backend, parsed.max_restarts) == ("c10d", 3)
    return parsed


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [({}, "1"), ({"SLURM_GPUS_ON_NODE": "8"}, "8"), ({"SLURM_GPUS_ON_NODE": "8", "RANKS_PER_NODE": "2"}, "2")],
)
def test_slurm_starts_torchrun(slurm, environment, ranks):
    slurm.environment |= environment
    code, output = slurm.run(ROOT / "launch" / "slurm.sbatch", "experiment=dream_s1k", "seed=1")
    assert code == 0
    module, *arguments = output.splitlines()[1:]
    assert module == "torch.distributed.run"
    parsed = torchrun(arguments)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_id) == ("2", ranks, "7")
    assert parsed.training_script_args == ["experiment=dream_s1k", "seed=1"]
    assert not (slurm.home / "requeued.txt").exists()


@pytest.mark.parametrize(("preempted", "requeued"), [("None", False), ("2030-01-01T00:00:00", True)])
def test_slurm_requeues_what_was_preempted_not_what_failed(slurm, preempted, requeued):
    slurm.stand_in("python", "exit 3")
    slurm.stand_in("scontrol", job_shown(preempted))
    assert slurm.run(ROOT / "launch" / "slurm.sbatch")[0] == 3
    assert (slurm.home / "requeued.txt").exists() == requeued


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False])
def test_slurm_requeues_before_the_time_limit_once_it_is_saved(slurm, saved):
    slurm.stand_in("srun", f"trap 'exit {int(not saved)}' USR1; touch ~/started; while :; do sleep 0.1; done")
    process = slurm.start(ROOT / "launch" / "slurm.sbatch")
    while not (slurm.home / "started").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == int(not saved)
    assert (slurm.home / "requeued.txt").exists() == saved


def test_skypilot_starts_torchrun(tmp_path):
    task = yaml.safe_load(SKYPILOT.read_text())
    environment = {"NUM_NODES": "2", "NUM_GPUS_PER_NODE": "8", "TASK_ID": "a", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
    script = Script(tmp_path, **{f"SKYPILOT_{name}": value for name, value in environment.items()})
    script.stand_in("python", PRINT_ARGUMENTS)
    for rank in (0, 1):
        script.environment["SKYPILOT_NODE_RANK"] = str(rank)
        code, output = script.run("-c", task["run"])
        assert code == 0
        parsed = torchrun(output.splitlines()[2:])
        assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_endpoint) == ("2", "8", "10.0.0.1:29500")
        assert parsed.rdzv_conf == f"is_host={1 - rank}"
        assert f"trainer.output_dir={next(iter(task['volumes']))}/" in " ".join(parsed.training_script_args)


def test_skypilot_sets_the_project_up():
    setup = yaml.safe_load(SKYPILOT.read_text())["setup"]
    subprocess.run(["bash", "-n"], input=setup, text=True, check=True)
    words = setup.split()
    assert (ROOT / words[words.index("--constraint") + 1]).is_file()
    assert find_spec(words[words.index("-m") + 1])


def test_trainjob_starts_torchrun():
    trainer = yaml.safe_load(TRAINJOB.read_text())["spec"]["trainer"]
    command, *arguments = trainer["command"] + trainer["args"]
    assert command == "torchrun"
    torchrun(arguments)


def test_skypilot_accepts_its_file(monkeypatch):
    sky = pytest.importorskip("sky", reason="needs SkyPilot: pip install skypilot")
    monkeypatch.chdir(ROOT)
    task = sky.Task.from_yaml(str(SKYPILOT))
    assert task.num_nodes == 2
    assert all(resources.use_spot for resources in task.resources)


def test_kubeflow_accepts_its_file():
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs pip install kubeflow-trainer-api")
    job = yaml.safe_load(TRAINJOB.read_text())
    # Its models drop fields that they do not know.
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
