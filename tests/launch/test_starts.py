"""SIGINT during the imports of a command, and closed outputs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

COMMANDS = {
    "train": ["train.py", "trainer.max_steps=100000"],
    "sample": ["sample.py", "prompt=Hi"],
    "evaluate": ["evaluate.py"],
    "prepare": ["-m", "data.prepare", "countdown", "out.jsonl"],
    "adapt": ["-m", "diffllm.adapt", "nowhere", "out"],
    "export": ["-m", "trainer.export", "nowhere", "out"],
    "replay": ["-m", "trainer.replay", "nowhere"],
    "serve": ["-m", "launch.serve", "model.path=nowhere"],
    "plan": ["-m", "launch.plan", "model=dream_7b", "gpus=8", "gpu_memory=80"],
    "playground": ["-m", "launch.playground"],
}
every_command = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def start(command, **settings):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, **{"env": BUFFERED, **pipes, **settings})


def alone(code):
    """A program with the module, but not with the package, whose imports take seconds."""
    return ["-c", f"import sys\nsys.path.insert(0, {str(ROOT / 'data')!r})\nimport terminal\n{code}"]


@pytest.fixture
def interrupted_import(tmp_path):
    """An environment in which SIGINT comes while torch is imported, which makes something else of it."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n    raise ImportError('torch is broken') from None\n"
        "raise ImportError('SIGINT is lost')\n"
    )
    return BUFFERED | {"PYTHONPATH": str(tmp_path)}


@every_command
def test_sigint_while_a_command_is_imported(command, interrupted_import):
    process = start(command, env=interrupted_import)
    assert process.communicate() == ("", "stopped by SIGINT\n")
    assert process.returncode == 130


def test_of_the_ranks_of_a_machine_one_speaks(interrupted_import):
    process = start(COMMANDS["train"], env=interrupted_import | {"LOCAL_RANK": "1"})
    assert process.communicate() == ("", "")
    assert process.returncode == 130


@pytest.mark.parametrize("imported", ["launch", "trainer", "data.terminal"])
def test_other_programs_keep_their_sigint(imported):
    read = "signal.getsignal(signal.SIGINT)"
    code = f"import signal; before = {read}; import {imported}; assert {read} is before"
    assert start(["-c", code]).wait() == 0


@pytest.mark.parametrize(
    ("code", "closed"),
    [
        ("print('a')", "stdout"),
        ("print('a' * 10**6)", "stdout"),
        pytest.param("print('a', flush=True)", "stdout", marks=pytest.mark.slow),
        pytest.param("print('a'); sys.exit(3)", "stdout", marks=pytest.mark.slow),
        pytest.param("[print(i, flush=True) for i in range(10**5)]", "stdout", marks=pytest.mark.slow),
        ("print('a', file=sys.stderr)", "stderr"),
    ],
)
def test_a_reader_that_leaves_ends_a_command_quietly(code, closed):
    """As it ends `yes`."""
    read, write = os.pipe()
    os.close(read)
    process = start(
        ["-c", f"import sys\nfrom data import terminal\nwith terminal.running():\n    {code}"], **{closed: write}
    )
    os.close(write)
    out, err = process.communicate()
    assert (out or "", err or "") == ("", "")
    assert process.returncode == -signal.SIGPIPE


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("print('a')", (0, "a\n", "")),
        ("raise BrokenPipeError('of a worker')", (1, "", "error: of a worker\n")),
        ("raise ValueError('a\\x1b')", (1, "", "error: a\\x1b\n")),
        ("print('a'); raise KeyboardInterrupt", (130, "a\n", "stopped by SIGINT\n")),
        ("sys.exit(4)", (4, "", "")),
    ],
)
def test_how_else_a_command_ends(code, end):
    process = start(alone(f"with terminal.ending_in_one_line():\n    {code}"))
    out, err = process.communicate()
    assert (process.returncode, out, err) == end


@pytest.mark.slow
@every_command
def test_sigint_at_many_moments(command, tmp_path):
    """A command may end before the last SIGINT; a training run prints its message when it saves."""
    for tenths in (3, 6, 10, 15, 20, 25, 30, 35, 40, 50, 60):
        more = [f"trainer.output_dir={tmp_path}"] if command[0] == "train.py" else []
        process = start([*command, *more])
        time.sleep(tenths / 10)
        running = process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        assert "Traceback" not in err
        if running:
            stopped = process.returncode == 130 and "stopped by SIGINT" in out + err
            unborn = process.returncode == -signal.SIGINT and not err  # Python was not up yet, or shut down already
            assert stopped or unborn or err.startswith("error: ")  # it was ending by itself


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["train.py", "--help"], ["evaluate.py", "--cfg", "job"], COMMANDS["plan"], ["-m", "data.prepare", "--help"]],
    ids=str,
)
@pytest.mark.parametrize("lines", [0, 1])
def test_the_first_lines_of_a_command(command, lines):
    process = start(command)
    for _ in range(lines):
        assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() in ((-signal.SIGPIPE,) if not lines else (0, -signal.SIGPIPE))
