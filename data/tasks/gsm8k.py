"""GSM8K (arXiv 2110.14168): word problems whose answers are numbers, from the hub or `task.files.gsm8k`."""

from collections.abc import Iterator
from typing import Literal

from data.chat import THINK
from data.convert import RAW_SETS, convert
from data.readers import PlacedRow
from data.tasks.base import Task
from data.tasks.judge import extract


class Gsm8k(Task):
    name = "gsm8k"
    hub_id = RAW_SETS["gsm8k"].hub_id

    def rows(self, split: Literal["train", "test"]) -> Iterator[PlacedRow]:
        """Yield rows as `data.prepare gsm8k` writes them, from such rows or published ones. Add others to `bad`.

        Raises:
            ValueError: see `file_of` and `read`.
        """
        for placed in self.read([self.file_of(split)]):
            try:
                is_raw = THINK not in str(placed.row.get("answer"))
                yield PlacedRow(convert(placed, RAW_SETS["gsm8k"]), placed.place) if is_raw else placed
            except ValueError as error:
                self.bad.add(error)

    def answer(self, response: str) -> str | None:
        """Return the final answer of a response, or None if it has no form of answer."""
        return extract(response)
