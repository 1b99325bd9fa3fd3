"""Multiple choice: the model chooses the likeliest option of a row, as an answer to its question."""

from collections.abc import Iterator
from string import ascii_uppercase
from typing import Any, Literal

from data.chat import Message, is_given, kind_of, to_prompt
from data.readers import PlacedRow
from data.tasks.base import Task

FIELDS = ("options", "choices")
ANSWERS = ("answer", "answerKey", "response")


class Choice(Task):
    name = "choice"
    judge = "exact"
    kind = "choose"

    def rows(self, split: Literal["train", "test"]) -> Iterator[PlacedRow]:
        """Return the rows of `task.files.choice`.

        Raises:
            ValueError: see `test_file` and `read`.
        """
        return self.read([self.test_file(split)])

    def messages(self, row: PlacedRow) -> list[Message]:
        """Return the prompt of a row as chat messages; the options are not listed in it.

        Raises:
            ValueError: `question` and `prompt` differ, or see `data.chat.to_prompt`.
        """
        if len({str(row.row[name]) for name in ("question", "prompt") if is_given(row.row.get(name))}) > 1:
            raise ValueError(f"{row.place}: fields 'question' and 'prompt' differ: leave one out")
        return to_prompt(row)

    def options(self, row: PlacedRow) -> list[str]:
        """Return the options of a row.

        Raises:
            ValueError: they are not two or more different texts in one of FIELDS, or in its `text`.
        """
        return _options(row)[0]

    def reference(self, row: PlacedRow) -> str:
        """Return the option that a field of ANSWERS gives as an index from 0, a label or letter, or the text.

        Raises:
            ValueError: it is none of them, two options could be meant, or two fields mean others; or see `options`.
        """
        given = {name: row.row[name] for name in ANSWERS if row.row.get(name) is not None} or {ANSWERS[0]: None}
        meant = [_meant(row, name, answer) for name, answer in given.items()]
        if len({*meant}) > 1:
            raise ValueError(f"{row.place}: fields that mean two options: {given}; leave one out")
        return meant[0]

    def score(self, row: PlacedRow, response: str) -> float:
        """Return 1 for the right option, else 0.

        Raises:
            ValueError: see `reference`.
        """
        return float(response == self.reference(row))


def _meant(row: PlacedRow, name: str, answer: Any) -> str:
    """Return the option that a field means."""
    options, labels = _options(row)
    what = f"{row.place}: field '{name}'"
    names = [*map(str, labels or ())]
    if isinstance(answer, int) and not isinstance(answer, bool):
        if str(answer) in names and names.index(str(answer)) != answer:
            raise ValueError(f"{what} is {answer}, which is an index and another option's label: write a label as text")
        if not 0 <= answer < len(options):
            raise ValueError(f"{what} is {answer}, but the indices of the options are 0 … {len(options) - 1}")
        return options[answer]
    if not isinstance(answer, str):
        raise ValueError(f"{what} must be an index, a letter or the text of an option, not {kind_of(answer)}")
    if answer in names:  # labels 1 … 4 may stand beside texts that are numbers
        return options[names.index(answer)]
    letters = ascii_uppercase[: len(options)]
    meant = {option for option in options if option.strip() == answer.strip()}
    if not labels and answer.strip() in [*letters]:
        meant.add(options[letters.index(answer.strip())])
    if len(meant) != 1:
        problem = "two options, as a letter and as a text" if meant else f"none of the options {options}"
        raise ValueError(f"{what} is {answer!r}, which is {problem}: give the index of an option, from 0")
    return meant.pop()


def _options(placed: PlacedRow) -> tuple[list[str], list[str] | None]:
    """Options of a row, and their labels if it has some."""
    row, place = placed
    given = [name for name in FIELDS if row.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "neither"
        raise ValueError(f"{place}: a row needs its options as a list in {' or '.join(FIELDS)}; it has {found}")
    options: Any = row[given[0]]
    labels = None
    if isinstance(options, dict):  # as sets of the hub have them
        options, labels = options.get("text"), options.get("label")
    what = f"{place}: field '{given[0]}'"
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise ValueError(f"{what} must be a list of texts, or an object with the lists text and label")
    if len(options) < 2 or len({*options}) < len(options):
        raise ValueError(f"{what} has {len(options)} options: must be at least two, and no two alike")
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(options)):
        raise ValueError(f"{what}: its label must be a list with one for each of the {len(options)} texts")
    return options, labels
