"""The order in which requests have the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class Queue:
    """Places in the order in which they were taken. The turn of the first one lasts until it is given up.

    Args:
        waiting: most places behind the first.
    """

    def __init__(self, waiting: int):
        self._waiting = waiting
        self._places: list[object] = []
        self._changed = Condition()  # guards the places

    @contextmanager
    def place(self) -> Iterator[object]:
        """Hold a new place.

        Raises:
            ValueError: all are taken.
        """
        place = object()
        with self._changed:
            if len(self._places) > self._waiting:
                raise ValueError(f"{self._waiting} other requests wait for the model: try again later")
            self._places.append(place)
        try:
            yield place
        finally:
            with self._changed:
                self._places.remove(place)
                self._changed.notify_all()

    def before(self, place: object, timeout: float = 0.0) -> int:
        """Number of places before one, after a wait of up to `timeout` seconds for a change unless it is the first."""
        with self._changed:
            if self._places[0] is not place:
                self._changed.wait(timeout)
            return self._places.index(place)
