"""Linear equations solved step by step, in S1K's schema: the built-in reasoning task.

The problems are all a·x + b = c and a·x - b = c with a, x, b in 1 … 12 and c ≥ 0. Those with a = 1 need one step, the
others two, so responses differ in length. The order is fixed; the first sixth is held out of training for evaluation.
"""

import itertools
from typing import Any, Literal

import numpy as np

from data.chat import END_THINK, THINK
from data.readers import PlacedRow
from data.tasks.base import Task
from data.tasks.judge import extract

HELD_OUT_SHARE = 6  # one problem in six
_ORDER_SEED = 0


class Equations(Task):
    name = "equations"
    reads_files = False

    def rows(self, split: Literal["train", "test"]) -> list[PlacedRow]:
        """Return the held-out problems for `test`, all others for `train`."""
        problems = _problems()
        order = np.random.default_rng(_ORDER_SEED).permutation(len(problems))
        held_out = len(problems) // HELD_OUT_SHARE
        chosen = {"train": order[held_out:], "test": order[:held_out]}[split]
        return [PlacedRow(_row(*problems[i]), f"equation {i}") for i in chosen]

    def answer(self, response: str) -> str | None:
        """Return the final answer of a response, or None if it has no form of answer."""
        return extract(response)


def _problems() -> list[tuple[int, int, int, str]]:
    candidates = itertools.product(range(1, 13), range(1, 13), range(1, 13), "+-")
    return [(a, x, b, sign) for a, x, b, sign in candidates if sign == "+" or a * x >= b]


def _row(a: int, x: int, b: int, sign: str) -> dict[str, Any]:
    product = a * x
    c = product + b if sign == "+" else product - b
    undo = "-" if sign == "+" else "+"
    steps = [f"{c}{undo}{b}={product}"] + ([f"{product}/{a}={x}"] if a > 1 else [])
    return {
        "question": f"Solve {a if a > 1 else ''}x{sign}{b}={c}",
        "answer": "\n".join([THINK, *steps, END_THINK, str(x)]),
        "source": "equations",
        "difficulty": len(steps),
        "thinking_tokens": 1 + 6 * len(steps),  # a number is one token of the built-in tokenizer
        "answer_tokens": 2,
    }
