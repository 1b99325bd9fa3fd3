"""Infilling: the model restores the text between a prefix and a suffix, as raw text."""

from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Literal

from transformers import PreTrainedTokenizerBase

from data.chat import kind_of
from data.readers import PlacedRow
from data.tasks.base import Task

SLOT = "<|mask"  # how a slot begins


class Infill(Task):
    name = "infill"
    judge = "exact"
    kind = "infill"

    def rows(self, split: Literal["train", "test"]) -> Iterator[PlacedRow]:
        """Return the rows of `task.files.infill`.

        Raises:
            ValueError: see `test_file` and `read`.
        """
        return self.read([self.test_file(split)])

    def template(self, row: PlacedRow, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return prefix, slot and suffix. The slot has the length of the row's `slot`, else of `task.slot`.

        Without both it has as many tokens as `middle`, so that the model knows the length.

        Raises:
            ValueError: a field is not text, `middle` is white space, or prefix or suffix holds a slot.
        """
        prefix, suffix = (_text(row, name) for name in ("prefix", "suffix"))
        if SLOT in prefix + suffix:
            raise ValueError(f"{row.place}: the prefix or suffix holds {SLOT!r}, which would be taken for a slot")
        length = self.settings.slot if row.row.get("slot") is None else row.row["slot"]
        if length is None:
            length = len(tokenizer(self.reference(row), add_special_tokens=False)["input_ids"])
        return f"{prefix}{SLOT}:{length}|>{suffix}"

    def reference(self, row: PlacedRow) -> str:
        """Return the text that is missing.

        Raises:
            ValueError: it is no text, or white space, which an empty response would equal.
        """
        if not (middle := _text(row, "middle")).strip():
            raise ValueError(f"{row.place}: field 'middle' is empty or white space: leave the row out")
        return middle

    def answer(self, response: str) -> str | None:
        """Return the text of the slot, or None for white space."""
        return response.strip() or None

    def score(self, row: PlacedRow, response: str) -> float:
        """Return 1 if the response is `middle`, ignoring white space around both, else 0.

        Raises:
            ValueError: see `reference`.
        """
        return float(response.strip() == self.reference(row).strip())

    def metrics(self, row: PlacedRow, response: str) -> dict[str, float]:
        """Return the edit similarity, `difflib.SequenceMatcher.ratio`: 2 × matching characters / all characters."""
        return {"edit_similarity": SequenceMatcher(None, response, self.reference(row), autojunk=False).ratio()}


def _text(placed: PlacedRow, name: str) -> str:
    row, place = placed
    if not isinstance(row.get(name), str):
        raise ValueError(
            f"{place}: field '{name}' must be text, not {kind_of(row.get(name))}; a row needs prefix, suffix and middle"
        )
    return row[name]
