"""Escape control characters for the terminal, and end commands with one line.

Packages with commands import this module first: their other imports take seconds. A SIGINT during them must neither
print a traceback nor be caught by a library.
"""

import os
import select
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Timer
from typing import NoReturn

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
SCRIPTS = ("train.py", "sample.py", "evaluate.py")
MODULES = (
    *("data.prepare", "diffllm", "diffllm.adapt", "launch.compare", "launch.compare_sampling", "launch.experiments"),
    *("launch.experiments.sweep", "launch.lm_eval", "launch.plan", "launch.playground", "launch.ranks"),
    *("launch.reference", "launch.serve", "launch.show", "launch.verify"),
    *("trainer.export", "trainer.plot", "trainer.replay"),
)
STOPPED = "stopped by SIGINT"

_ESCAPED = [
    *(*range(9), *range(11, 32), *range(0x7F, 0xA0)),  # C0 but tab and newline, DEL and C1
    *(0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # marks of direction
    *range(0xD800, 0xE000),  # surrogates, which have no bytes
]
_ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _ESCAPED}


def printable(text: object) -> str:
    r"""Escape characters that control a terminal, or reorder its text, as `\x1b`."""
    return str(text).translate(_ESCAPES)


def print_stderr(text: object) -> None:
    """Print text on stderr, escaped, at once."""
    print(printable(text), file=sys.stderr, flush=True)


def for_stdout(text: str) -> str:
    """Text for stdout: escaped on a terminal, exact in a file or pipe."""
    return printable(text) if sys.stdout.isatty() else text


def _stop_at_once(number: int, frame: object) -> None:
    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, f"{STOPPED}\n".encode())
    finally:
        os._exit(128 + number)  # a module being imported could catch an exception


def _starts_command() -> bool:
    """Whether this process runs one of the commands; other programs keep their SIGINT."""
    if sys.argv[:1] == ["-m"]:  # while Python imports the package of the module
        return any(argument.removeprefix("-m") in MODULES for argument in sys.orig_argv)
    script = os.path.realpath(getattr(sys.modules["__main__"], "__file__", None) or "")
    return script in [os.path.join(ROOT, name) for name in SCRIPTS]


@contextmanager
def running() -> Iterator[None]:
    """Run a command after its imports. SIGINT raises KeyboardInterrupt; a closed output ends the process by SIGPIPE."""
    starting = signal.getsignal(signal.SIGINT) is _stop_at_once
    if starting:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # at exit an error could not be handled
    except BrokenPipeError:
        if not any(map(_unread, (1, 2))):  # it was another pipe
            raise
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
    finally:
        if starting:
            signal.signal(signal.SIGINT, _stop_at_once)


@contextmanager
def announced(work: str, seconds: float = 2.0) -> Iterator[None]:
    """Name the work of the block on rank 0's terminal, if it takes longer than some seconds."""
    timer = Timer(seconds, _print_above_bars, [f"{work} …"])
    timer.daemon = True
    if os.environ.get("RANK", "0") == "0" and sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _print_above_bars(line: str) -> None:
    from tqdm import tqdm  # rarely needed

    with tqdm.external_write_mode(file=sys.stderr):
        print_stderr(line)


def _unread(descriptor: int) -> bool:
    """Whether a descriptor is a pipe without a reader."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def table(rows: Iterable[Sequence[object]]) -> str:
    """Rows as lines of aligned cells, the first column left, the others right. None is an empty cell."""

    def text(cell: object) -> str:
        return "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else printable(cell)

    texts = [[text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in texts)
    return "\n".join("  ".join(line).rstrip() for line in lines)


class Parser(ArgumentParser):
    """Parses the arguments of `python -m MODULE`, and escapes its errors."""

    def __init__(self, module: str, description: str | None):
        super().__init__(f"python -m {module}", description=description, formatter_class=RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


@contextmanager
def ending_in_one_line(stopped: str = STOPPED) -> Iterator[None]:
    """Run a command. An expected error ends it with one line and exit code 1, Ctrl-C with 130.

    Args:
        stopped: message after Ctrl-C.
    """
    try:
        with running():
            yield
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        sys.exit(printable(f"error: {error}"))
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)


if _starts_command():
    signal.signal(signal.SIGINT, _stop_at_once)
