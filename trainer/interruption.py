"""Stop at the end of a step when a signal arrives."""

import signal
from types import FrameType

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")


class Interruption:
    """Counts SIGTERM, SIGINT and SIGUSR1, so that the loop can stop after the current step.

    The run then exits with 143 or 130, the codes of a process that dies of the first two. SIGUSR1 comes from a script
    that restarts the run; its exit code is 0. A second SIGINT interrupts at once.
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
        name = signal.Signals(number).name
        self.received[name] += 1
        if name == "SIGINT" and self.received[name] > 1:
            raise KeyboardInterrupt
