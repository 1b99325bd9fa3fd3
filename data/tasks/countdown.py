"""Countdown: make a target from 3 to 5 numbers by + - * /, using each number once.

The published sets (arXiv 2410.14157) have rows such as {"input": "15,44,79,50", "output": "44-15=29,79-29=50"}, with
the target last. Dream-7B is evaluated on such problems (arXiv 2508.15487).

The thinking of a problem with three numbers has, for every pair, its results beside those of the third number and the
target, such as 44,15:+59-29*660/_ 79,50:+129-29*_/_=29. A result that both have solves the problem.
"""

import ast
import re
from collections import Counter
from collections.abc import Hashable
from fractions import Fraction
from operator import add, mul, sub, truediv
from random import Random
from typing import Any

from data.chat import final_answer, kind_of, with_thinking
from data.readers import PlacedRow
from data.tasks.generated import GeneratedTask

LARGEST = 999  # of a generated number: one token of the built-in tokenizer
OPERATIONS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}
SIGNS = str.maketrans("×·÷−–[]", "**/--()")
TIMES = re.compile(r"\\(?:times|cdot)\b|(?<=[\d)]) ?[xX] ?(?=[\d(])")
LIST_NUMBER = re.compile(r"^ *\d+[.)] +", re.MULTILINE)
INPUT = re.compile(r" *\d{1,9} *(?:, *\d{1,9} *)+")
# A minus sign without a space behind it begins a negative result.
EXPRESSION = re.compile(r"(?:(?<![\d)])(?<![\d)] )-)?[\d(][\d()+*/ -]{0,200}[\d)]")
EQUATION = re.compile(rf"({EXPRESSION.pattern}) ?= ?(-?\d{{1,18}})(?!\d)")


class Countdown(GeneratedTask):
    name = "countdown"

    def generate(self, random: Random) -> dict[str, Any]:
        """Return a problem with `task.numbers` numbers in 1 … 99 and a target in 10 … 99, with steps that solve it."""
        while True:
            numbers = [random.randint(1, 99) for _ in range(self.settings.numbers)]
            target, steps = _combine(numbers, random)
            if 10 <= target <= 99:
                return _row(numbers, target, "\n".join(steps))

    def convert(self, placed: PlacedRow) -> dict[str, Any]:
        """Return a row with `input`, numbers and target, or with `numbers` (or `nums`) and `target`."""
        row, place = placed
        named, output = row.get("numbers", row.get("nums")), row.get("output")
        given = [[*map(int, row["input"].split(","))]] if INPUT.fullmatch(str(row.get("input"))) else []
        given += [[*named, row.get("target")]] if isinstance(named, list) else []
        fields = [name for name in ("input", "numbers", "nums") if row.get(name) is not None]
        if not given or len(given) < len(fields) or not all(type(each) is int for each in given[-1]):
            raise ValueError(
                f"{place}: countdown needs input='15,44,79,50', the target last, or numbers and target; all whole"
            )
        if given[0] != given[-1]:
            raise ValueError(f"{place}: field 'input' has {given[0]}, numbers and target {given[-1]}")
        if not isinstance(output, str | None):
            raise ValueError(f"{place}: field 'output' must be text such as 44-15=29,79-29=50, not {kind_of(output)}")
        *numbers, target = given[0]
        if len(numbers) < 2:
            raise ValueError(f"{place}: a problem of countdown needs two numbers or more, and its target")
        steps = (output or "").replace(",", "\n")
        converted = _row(numbers, target, steps)
        if steps and not self.score(PlacedRow(converted, place), steps):
            raise ValueError(f"{place}: field 'output' is {output!r}, which does not make {target} from {numbers}")
        return converted

    def key(self, row: dict[str, Any]) -> Hashable:
        return (*sorted(row["metadata"]["numbers"]), row["metadata"]["target"])

    def answer(self, response: str) -> str | None:
        """Return the last expression of a response, or None."""
        *_, last = [None, *_expressions(_plain(response))]
        return last

    def score(self, row: PlacedRow, response: str) -> float:
        """Return 1 if the steps, or the last expression of all numbers, make the target and use each number once."""
        numbers, target = row.row["metadata"]["numbers"], row.row["metadata"]["target"]
        text = _plain(response)
        steps = [(left, int(right)) for left, right in EQUATION.findall(text)]
        whole = [each for each in _expressions(text) if len(re.findall(r"\d+", each)) == len(numbers)]
        last = [(whole[-1], target)] if whole else []
        return float(any(_makes(equations, numbers, target) for equations in (steps, last)))


def _plain(response: str) -> str:
    """A response after its thinking, in signs of Python and without numbers of a list."""
    text = TIMES.sub("*", final_answer(response).translate(SIGNS))
    return LIST_NUMBER.sub("", text)


def _expressions(text: str) -> list[str]:
    return [each for each in EXPRESSION.findall(text) if re.search(r"[\d)] *[-+*/]", each)]


def _combine(numbers: list[int], random: Random) -> tuple[int, list[str]]:
    """Join two random numbers by a random sign until one is left. Return it, and the steps."""
    pool, steps = list(numbers), []
    while len(pool) > 1:
        x, y = (pool[i] for i in sorted(random.sample(range(len(pool)), 2)))
        sign = random.choice("+-*/")
        z = _results(x, y)[sign]
        if z is not None:
            pool.remove(x)
            pool.remove(y)
            pool.append(z)
            if sign in "-/":
                x, y = max(x, y), min(x, y)
            steps.append(f"{x}{sign}{y}={z}")
    return pool[0], steps


def _results(x: int, y: int) -> dict[str, int | None]:
    """Results by the four signs, of the larger and the smaller number; None if it is no whole number, or too large."""
    x, y = max(x, y), min(x, y)
    results = {"+": x + y, "-": x - y, "*": x * y, "/": x // y if y and x % y == 0 else None}
    return {sign: None if z is None or z > LARGEST else z for sign, z in results.items()}


def _row(numbers: list[int], target: int, response: str) -> dict[str, Any]:
    prompt = f"Make {target} from {','.join(map(str, numbers))}"
    if len(numbers) == 3:
        response = _searched(*numbers, target) or response
    return {"prompt": prompt, "response": response, "metadata": {"numbers": numbers, "target": target}}


def _searched(a: int, b: int, c: int, target: int) -> str | None:
    """Return thinking with the steps that it finds, or None. `_` stands for no result, so that all are equally long."""
    lines, steps = [], None
    for x, y, z in ((a, b, c), (a, c, b), (b, c, a)):
        first, last = _results(x, y), _results(z, target)
        common = [each for each in first.values() if each and each in last.values()]
        lines.append(f"{x},{y}:{_text(first)} {z},{target}:{_text(last)}={common[0] if common else '_'}")
        if common and steps is None:
            m = common[0]
            undone = {
                "+": f"{m}-{z}",
                "-": f"{m}+{z}" if target > z else f"{z}-{m}",
                "*": f"{m}/{z}",
                "/": f"{m}*{z}" if target >= z else f"{z}/{m}",
            }
            steps = f"{max(x, y)}{_sign(first, m)}{min(x, y)}={m}\n{undone[_sign(last, m)]}={target}"
    return steps and with_thinking("\n".join(lines), steps)


def _sign(results: dict[str, int | None], result: int) -> str:
    return next(sign for sign, each in results.items() if each == result)


def _text(results: dict[str, int | None]) -> str:
    return "".join(f"{sign}{result or '_'}" for sign, result in results.items())


def _makes(equations: list[tuple[str, int]], numbers: list[int], target: int) -> bool:
    """Whether true equations, in order, use each number and each result once, and leave the target."""
    left = Counter(numbers)
    for expression, result in equations:
        try:
            tree = ast.parse(expression.strip(), mode="eval").body
            value, terms = _evaluate(tree)
            if value != result or not (used := Counter(terms)) <= left:
                return False
        except (SyntaxError, ValueError, ZeroDivisionError):
            return False
        left = left - used + Counter([result])
    return left == Counter([target]) and bool(equations)


def _evaluate(node: ast.expr) -> tuple[Fraction, list[int]]:
    """Return the value of an expression of whole numbers, and these numbers.

    Raises:
        ValueError: it has another part, such as a power.
        ZeroDivisionError: it divides by 0.
    """
    match node:
        case ast.Constant(int(number)):
            return Fraction(number), [number]
        case ast.UnaryOp(ast.USub(), ast.Constant(int(number))):
            return Fraction(-number), [-number]
        case ast.BinOp(left, operation, right) if type(operation) in OPERATIONS:
            (x, numbers), (y, more) = _evaluate(left), _evaluate(right)
            return OPERATIONS[type(operation)](x, y), numbers + more
    raise ValueError(ast.unparse(node))
