r"""Mathematical problems whose answers are numbers or formulas: rows like those of MATH, or of S1K.

MATH (arXiv 2103.03874) has `problem`, and `solution` with the answer in `\boxed{}` or a short `answer`, or both.
"""

import re
from collections.abc import Iterator
from math import isfinite
from typing import Any, Literal

from data.chat import THINK, is_given
from data.config import DataConfig, TaskConfig
from data.readers import PlacedRow
from data.tasks.base import Task, installed
from data.tasks.judge import extract, is_right, plain, stated
from data.tasks.normal import clean, formulas, is_same, kind_of_answer
from data.tasks.symbolic import Symbolic

WORDS = 5  # of an answer that is text
REFUSAL = re.compile(
    r"(?:I|we) (?:do not|don't|can not|cannot|can't|could not|am not)\b|I'm (?:not|sorry|unable)|sorry|not sure|"
    "no idea|unable",
    re.IGNORECASE,
)


class Math(Task):
    name = "math"
    hub_id = "HuggingFaceH4/MATH-500"

    def __init__(self, config: DataConfig | None = None, settings: TaskConfig | None = None):
        super().__init__(config, settings)
        self._version = installed("math-verify")
        self._compare_formulas = Symbolic()

    @property
    def judge(self) -> str:
        """`math-verify` with its version where it is installed, after the strict normaliser."""
        return f"math-verify {self._version}" if self._version else super().judge

    def rows(self, split: Literal["train", "test"]) -> Iterator[PlacedRow]:
        """Yield the rows as prompts and responses; S1K's stay as they are.

        Raises:
            ValueError: see `file_of` and `read`.
        """
        for placed in self.read([self.file_of(split)]):
            try:
                yield PlacedRow(_converted(placed), placed.place)
            except ValueError as error:
                self.bad.add(error)

    def expected(self, row: PlacedRow) -> str:
        """Return the row's `answer`, or what its solution states.

        Raises:
            ValueError: neither is an answer that can be judged.
        """
        answer = row.row.get("answer")
        short = isinstance(answer, str) and THINK not in answer and len(answer.split()) <= WORDS
        expected = stated(answer if short else self.reference(row)) or (short and answer)
        if not expected:
            raise ValueError(
                f"{row.place}: the reference states no answer that can be judged; it needs \\boxed{{…}}, 'answer is …' "
                f"or '#### …', or an answer of at most {WORDS} words in field 'answer'"
            )
        return expected

    def answer(self, response: str) -> str | None:
        """Return the final answer of a response, or all of a response of a few words that is no refusal, or None."""
        text = (plain(response) or "").replace("’", "'")
        return extract(response) or (text if len(text.split()) <= WORDS and not REFUSAL.match(text) else None) or None

    def score(self, row: PlacedRow, response: str) -> float:
        """Return 1 if the final answer of a response is the expected one, as a number, formula or text."""
        return float(is_right(response, self.expected(row), self._is_same))

    def check(self, row: PlacedRow) -> None:
        """Refuse a row without an answer that can be judged, or with two.

        Raises:
            ValueError: the solution states another number than field `answer`; or see `expected`.
        """
        expected, own = self.expected(row), stated(self.reference(row))
        if own and {kind_of_answer(own), kind_of_answer(expected)} == {"number"} and not is_same(own, expected):
            raise ValueError(f"{row.place}: field 'answer' is {expected!r}, but the solution states {own!r}")

    def _is_same(self, answer: str, expected: str) -> bool:
        if is_same(answer, expected):
            return True
        if kind_of_answer(expected) == "text" and is_same(_lower_first(answer), _lower_first(expected)):
            return True
        pair = formulas(answer, expected) if self._version else None
        return pair is not None and self._compare_formulas(*pair)


def _lower_first(text: str) -> str:
    """Write a text such as Yes like yes; the case of other letters may matter, as in the names of lines."""
    text = clean(text)
    return text[:1].lower() + text[1:]


def _converted(placed: PlacedRow) -> dict[str, Any]:
    """Row with `prompt` and `response`, or S1K's and others as they are. A short answer stays beside its solution."""
    row, place = placed
    questions = [row[name] for name in ("problem", "question") if is_given(row.get(name))]
    if len(questions) > 1 and questions[0] != questions[1]:
        raise ValueError(f"{place}: fields 'problem' and 'question' differ; leave one out")
    question = questions[0] if questions else None
    solution, answer = row.get("solution"), row.get("answer")
    if isinstance(answer, bool) or (isinstance(answer, float) and not isfinite(answer)):
        raise ValueError(f"{place}: field 'answer' is {answer}: must be a number or text")
    if question is None or THINK in str(answer):
        return row
    answer = str(answer) if isinstance(answer, int | float) else answer
    return row | {"prompt": question, "response": solution if is_given(solution) else answer, "answer": answer}
