"""Base class of tasks with generated problems."""

from abc import abstractmethod
from collections.abc import Hashable, Iterator
from random import Random
from typing import Any, Literal

from data.chat import Message
from data.readers import PlacedRow
from data.report import Noted
from data.tasks.base import Task

TEST_ROWS = 500


class GeneratedTask(Task):
    """Problems from a fixed seed. With `task.files.NAME` the test rows are those of a file.

    A row has a prompt, a response, and the problem in `metadata`. Rows of a file may lack the response.
    """

    judge = "rules"

    def rows(self, split: Literal["train", "test"]) -> Iterator[PlacedRow]:
        """Yield the test rows, or `task.train_rows` problems that are not among them.

        Raises:
            ValueError: see `read`.
        """
        if split == "test":
            yield from self._test_rows()
            return
        held_out, made = {self.key(placed.row) for placed in self._test_rows()}, 0
        self.overlap, random = Noted(), Random(f"{self.name} train")
        while made < self.settings.train_rows:
            row = self.generate(random)
            if self.key(row) in held_out:
                self.overlap.add(row["prompt"])
            else:
                made += 1
                yield PlacedRow(row, f"{self.name} {made}")

    def _test_rows(self) -> Iterator[PlacedRow]:
        if self.name not in self.settings.files:
            random = Random(f"{self.name} test")
            yield from (PlacedRow(self.generate(random), f"{self.name} test {i + 1}") for i in range(TEST_ROWS))
            return
        for placed in self.read([self.file()]):
            try:
                yield PlacedRow(self.convert(placed), placed.place)
            except ValueError as error:
                self.bad.add(error)

    def messages(self, row: PlacedRow) -> list[Message]:
        return [{"role": "user", "content": row.row["prompt"]}]

    def reference(self, row: PlacedRow) -> str:
        return row.row["response"]

    def check(self, row: PlacedRow) -> None:
        """Refuse a row whose own response, if it has one, is not right."""
        if row.row["response"]:
            super().check(row)

    @abstractmethod
    def generate(self, random: Random) -> dict[str, Any]:
        """Return a row with a new problem."""

    @abstractmethod
    def convert(self, placed: PlacedRow) -> dict[str, Any]:
        """Return a row of a file in the form of `generate`.

        Raises:
            ValueError: a field is missing or of the wrong form; the message names the place.
        """

    @abstractmethod
    def key(self, row: dict[str, Any]) -> Hashable:
        """Return the problem of a row, the same for two rows with one problem."""
