"""End a failed run: every process, within seconds, with the error that caused the failure.

A rank that fails leaves others behind in collectives that never end, and may hang itself: in a communicator, a thread,
or on a disk that does not answer. torchrun would kill what is left 30 s later; without torchrun it would stay for ever.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch.distributed as dist

END_SECONDS = 8  # from the first error of a process to its end
PEER_SECONDS = 4  # that a rank has to end by itself when another has died
SPEAK_SECONDS = 2  # that a rank which did not fail first leaves to the one that did


class Deadline:
    """Ends the process at the latest `END_SECONDS` after its first error, whatever hangs.

    Only scripts arm it: a library does not kill the process of its caller.
    """

    armed = started = False

    @classmethod
    @contextmanager
    def on_error(cls) -> Iterator[None]:
        """Begin to count when an error leaves the block, unless that was done before.

        SystemExit is no error: a run that was asked to stop leaves with it. SIGALRM needs no help of threads, or of
        code that holds the interpreter.
        """
        try:
            yield
        except BaseException as error:
            if cls.armed and not isinstance(error, SystemExit):
                cls.armed, cls.started = False, True
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(END_SECONDS)
            raise


class FirstError:
    """Which of several ranks that fail prints its error: the one that claims it."""

    claimed = False  # by this process

    @classmethod
    def claim(cls, store: dist.Store) -> bool:
        """Whether no rank failed before this one, as far as the store of all ranks can be reached."""
        try:
            cls.claimed = store.add("failed", 1) == 1
        except RuntimeError:  # the rank that held the store is gone
            cls.claimed = True
        return cls.claimed


@dataclass
class PeerWatch:
    """Ends this rank when torchrun, or another rank that it started on this machine, has died.

    Attributes:
        peers: process ids of the other ranks of this machine, by rank.
    """

    peers: dict[int, int]
    agent: int = field(default_factory=os.getppid)

    def __post_init__(self) -> None:
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def dead(self) -> list[int]:
        """Ranks whose processes are gone."""
        return [rank for rank, process in self.peers.items() if not _is_alive(process)]

    def stop(self) -> None:
        """Let the other ranks end: all work is done."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(0.5):
            if self.dead() or os.getppid() != self.agent:
                break
        if not self._stopped.wait(PEER_SECONDS):
            os._exit(1)  # a collective that waits for the dead cannot be interrupted


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def leave(error: BaseException) -> None:
    """End the process as Python would, but without waiting for threads, children and communicators.

    Returns only if the error is SystemExit without a failure.
    """
    code = 1
    if isinstance(error, SystemExit):
        if error.code in (None, 0):
            return
        code = error.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    else:
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report_to_torchrun(text: str) -> None:
    """Leave the error where torchrun looks for it: it then stands at the end of its own report."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError), open(path, "w") as file:  # a full disk must not hide the error
            json.dump({"message": {"message": text, "extraInfo": details}}, file)
