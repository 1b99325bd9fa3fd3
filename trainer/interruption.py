"""Requests to stop, which clusters send as signals."""

import signal
from types import FrameType

NAMES = ("SIGTERM", "SIGUSR1")


class Interruption:
    """Counts SIGTERM and SIGUSR1 instead of dying of them, so that the trainer can stop where a step ends.

    After SIGTERM it ends with 143, as a process that dies of it. SIGUSR1 comes from someone who takes care of what
    follows: after it, it ends with 0.
    """

    def __init__(self) -> None:
        self.received = dict.fromkeys(NAMES, 0)

    def __enter__(self) -> "Interruption":
        self._before = {name: signal.signal(getattr(signal, name), self._count) for name in NAMES}
        return self

    def __exit__(self, *error: object) -> None:
        for name, handler in self._before.items():
            signal.signal(getattr(signal, name), handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.received[signal.Signals(number).name] += 1
