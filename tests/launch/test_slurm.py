"""launch/slurm.sbatch on a Slurm cluster of two nodes, both of them on this machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launch.test_cli import SMALL
from tests.trainer.runs import metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="needs Slurm: apt-get install slurm-wlm"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which slurmd runs as"),
]

# A requeued job waits for cred_expire, at least 5 seconds, before it may start again; the default is 2 minutes.
# Jobs of the partition `urgent` preempt those of `patient`.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdSpoolDir={directory}/%n
SlurmdPidFile={directory}/%n.pid
SlurmdLogFile={directory}/%n.log
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=localhost NodeAddr=localhost Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname=localhost NodeAddr=localhost Port={ports[2]} CPUs=1
PartitionName=patient Nodes=ALL PriorityTier=1 GraceTime=60 Default=YES
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
DAEMONS = (["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"])
STEPS = 200


class Cluster:
    """Slurm's commands for the cluster that is configured in a directory."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.environment = os.environ | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RANKS_PER_NODE": "1",
        }

    def __call__(self, *command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def train(self, name: str) -> tuple[str, Path]:
        """Submit a run of two nodes; its job and its directory, which has a log of the same name beside it."""
        run = self.directory / name
        job = self(
            *["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={run}.log"],
            *["launch/slurm.sbatch", *SMALL, "data.num_workers=1", f"trainer.max_steps={STEPS}"],
            *["trainer.save_checkpoint_steps=50", "trainer.logger=[]", f"trainer.output_dir={run}"],
        )
        return job.strip(), run

    def wait(self, job: str) -> int:
        """Wait until a job has completed; how often it was requeued."""
        wait_for(lambda: not re.search("JobState=(PENDING|RUNNING|COMPLETING)", self("scontrol", "show", "job", job)))
        shown = self("scontrol", "show", "job", job)
        assert "JobState=COMPLETED" in shown, shown
        return int(re.search(r"Restarts=(\d+)", shown)[1])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, "waited for three minutes"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("slurm")
    with ExitStack() as sockets:
        free = [sockets.enter_context(socket.socket()) for _ in DAEMONS]
        for each in free:
            each.bind(("localhost", 0))
        ports = [each.getsockname()[1] for each in free]
    (directory / "slurm.conf").write_text(SLURM_CONF.format(directory=directory, ports=ports))
    (directory / "state").mkdir()
    slurm = Cluster(directory)
    with (directory / "daemons.log").open("w") as log:
        daemons = [subprocess.Popen(command, env=slurm.environment, stdout=log, stderr=log) for command in DAEMONS]
        try:
            idle = ["sinfo", "--noheader", "--partition=patient", "--states=idle", "--format=%D"]
            wait_for(lambda: subprocess.run(idle, env=slurm.environment, capture_output=True).stdout.strip() == b"2")
            yield slurm
            slurm("scancel", "--state=PENDING", "--state=RUNNING", "--user=root")
            wait_for(lambda: not slurm("squeue", "--noheader"))
        finally:
            for daemon in daemons:
                daemon.terminate()
                daemon.wait()


@pytest.fixture(scope="module")
def whole(cluster) -> Path:
    """A run that nothing interrupts."""
    job, run = cluster.train("whole")
    assert cluster.wait(job) == 0
    return run


def warn(cluster: Cluster, job: str, run: Path) -> None:
    """Warn the job as Slurm does before the time limit."""
    cluster("scancel", "--batch", "--signal=USR1", job)


def preempt(cluster: Cluster, job: str, run: Path) -> None:
    cluster("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")


def kill_a_rank(cluster: Cluster, job: str, run: Path) -> None:
    pid = cluster("pgrep", "--oldest", "--full", f"^[^ ]*python[^ ]* -u train.py .*trainer.output_dir={run}")
    os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize(
    ("interrupt", "steps", "requeued"),
    [(warn, 20, 1), (preempt, 20, 1), (kill_a_rank, 60, 0)],
    ids=["warned", "preempted", "killed"],
)
def test_an_interrupted_run_equals_a_whole_one(cluster, whole, interrupt, steps, requeued):
    job, run = cluster.train(interrupt.__name__)
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) >= steps)
    interrupt(cluster, job, run)
    assert cluster.wait(job) == requeued
    log = run.with_suffix(".log").read_text()
    assert log.count("stopped by SIG") == requeued
    assert log.count("resumed from") == 1
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    model = Path("hf", "model.safetensors")
    assert (run / model).read_bytes() == (whole / model).read_bytes()
