"""End a failed run: every process, within seconds, with the error that caused the failure.

A rank that fails leaves others in collectives that never end, and may hang itself: in a communicator, a thread, or on a
disk that does not answer. torchrun kills the remaining processes after 30 s; without torchrun they stay for ever.
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
PEER_SECONDS = 4  # from the death of a peer to the end of this rank
SPEAK_SECONDS = 2  # that later failing ranks wait while the first prints its error


class Deadline:
    """Ends the process END_SECONDS after its first error, even if something hangs.

    Only scripts arm it: a library must not kill the process of its caller.
    """

    armed = started = False

    @classmethod
    @contextmanager
    def on_error(cls) -> Iterator[None]:
        """Start the deadline when the first error leaves the block.

        SystemExit is no error: a stopped run raises it. SIGALRM works whatever threads do and whoever holds the GIL.
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
    """Decides which failing rank prints its error: the first to claim it."""

    claimed = False  # by this process

    @classmethod
    def claim(cls, store: dist.Store) -> bool:
        """Whether this rank is the first to fail. If the ranks' store is gone, each is."""
        try:
            cls.claimed = store.add("failed", 1) == 1
        except RuntimeError:  # the rank that held the store is gone
            cls.claimed = True
        return cls.claimed


@dataclass
class PeerWatch:
    """Ends this rank when torchrun or a peer has died.

    Attributes:
        peers: process ids of the other ranks on this machine, by rank.
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
        """Stop watching: all work is done, and peers may end."""
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
    """End the process as Python does, but without waiting for threads, children and communicators.

    Returns if the error is a SystemExit of success.
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
    """Write the error to the file that torchrun appends to its report."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError), open(path, "w") as file:  # a full disk must not hide the error
            json.dump({"message": {"message": text, "extraInfo": details}}, file)
