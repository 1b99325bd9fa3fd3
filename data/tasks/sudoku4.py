"""Sudoku of 4 × 4 cells: each row, column and quarter holds 1 to 4.

Published rows have `input` and `output`, four lines of four digits, with 0 for an empty cell.
"""

import itertools
import re
from collections.abc import Hashable
from functools import cache
from random import Random
from typing import Any

import numpy as np

from data.chat import final_answer
from data.readers import PlacedRow
from data.tasks.generated import GeneratedTask

SIZE = 4
FEWEST_GIVENS, MOST_GIVENS = 4, 12
BESIDE = re.compile(r"^\W*row *\d\W*|[^\w\n]", re.IGNORECASE)  # the cells of a line
LINES = re.compile(r"^[1-4]{4}(?:\n[1-4]{4}){3}$", re.MULTILINE)
GRID = re.compile(r"[0-4]{4}(\n[0-4]{4}){3}")


class Sudoku4(GeneratedTask):
    name = "sudoku4"

    def generate(self, random: Random) -> dict[str, Any]:
        """Return a problem of 4 to 12 givens with exactly one solution."""
        grids = solutions()
        while True:
            solution = grids[random.randrange(len(grids))]
            givens = random.sample(range(SIZE**2), random.randint(FEWEST_GIVENS, MOST_GIVENS))
            if (grids[:, givens] == solution[givens]).all(1).sum() == 1:
                problem = np.zeros_like(solution)
                problem[givens] = solution[givens]
                return _row(_text(problem), _text(solution))

    def convert(self, placed: PlacedRow) -> dict[str, Any]:
        """Return a row with `input`, four lines of four digits, and perhaps `output`."""
        row, place = placed
        for name, text in (("input", row.get("input")), ("output", row.get("output"))):
            if not (isinstance(text, str) and GRID.fullmatch(text.strip())) and not (name == "output" and text is None):
                raise ValueError(f"{place}: field '{name}' must be four lines of four digits, 0 for an empty cell")
        return _row(row["input"].strip(), (row.get("output") or "").strip())

    def key(self, row: dict[str, Any]) -> Hashable:
        return row["metadata"]["problem"]

    def answer(self, response: str) -> str | None:
        """Return the last grid of a response, else its last 16 digits, or None if it has fewer."""
        text = final_answer(response)
        if grids := LINES.findall("\n".join(filter(None, (BESIDE.sub("", line) for line in text.splitlines())))):
            return grids[-1].replace("\n", "")
        digits = re.findall(r"\d", text)[-(SIZE**2) :]
        return "".join(digits) if len(digits) == SIZE**2 else None

    def score(self, row: PlacedRow, response: str) -> float:
        """Return 1 if the answer is a solution that keeps the givens."""
        if (answer := self.answer(response)) is None:
            return 0.0
        digits = np.array([*map(int, answer)])
        problem = np.array([int(digit) for digit in row.row["metadata"]["problem"].replace("\n", "")])
        if (digits != problem)[problem > 0].any():
            return 0.0
        return float((solutions() == digits).all(1).any())


@cache
def solutions() -> np.ndarray:
    """[288, 16] all complete grids."""
    lines = list(itertools.permutations(range(1, SIZE + 1)))
    grids = np.array(list(itertools.product(lines, repeat=SIZE)))  # [24^4, row, column]
    quarters = grids.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, SIZE, SIZE)
    groups = np.concatenate([grids.swapaxes(1, 2), quarters], axis=1)
    return grids[(np.sort(groups) == range(1, SIZE + 1)).all((1, 2))].reshape(-1, SIZE**2)


def _text(grid: np.ndarray) -> str:
    return "\n".join("".join(map(str, line)) for line in grid.reshape(SIZE, SIZE))


def _row(problem: str, solution: str) -> dict[str, Any]:
    return {
        "prompt": f"Solve the 4x4 sudoku\n{problem}",
        "response": solution,
        "metadata": {"problem": problem},
    }
