"""Evaluate formulas over a row in bounded time and memory, without changing the row."""

import ast
from collections.abc import Callable, Iterable
from typing import Any

from simpleeval import DEFAULT_OPERATORS, EvalWithCompoundTypes, FeatureNotAvailable, IterableTooLong, NumberTooHigh

from data.errors import listed

FUNCTIONS = {"len": len}
METHODS = {
    str: (
        *("startswith", "endswith", "count", "find", "lower", "upper", "strip", "lstrip", "rstrip", "split"),
        *("splitlines", "removeprefix", "removesuffix", "isalpha", "isalnum", "isdigit", "isspace", "islower"),
        "isupper",
    ),
    list: ("count", "index"),
    dict: ("get", "keys", "values", "items"),
}
BITWISE = (ast.BitAnd, ast.BitOr, ast.BitXor, ast.Invert, ast.LShift, ast.RShift)
REFUSED = (ast.JoinedStr, ast.NamedExpr, ast.Lambda, ast.Starred, ast.Await, ast.Yield, ast.YieldFrom, ast.SetComp)
OF_NUMBERS = (ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)  # refuses `[0] * 9` and `"%9d" % 0`
CONTAINERS = (str, bytes, list, tuple, set, dict)
WORK = 2**20  # work limit per row, about a second; reading one list element is 1 unit
STEP = 16  # work to evaluate a node of the formula
CHARACTERS = 64  # characters read for 1 unit of work
MAX_BITS = 2**14  # of an integer


def check_syntax(formula: ast.expr) -> None:
    """Refuse a formula with a function, method or operator that is not allowed.

    Raises:
        ValueError: naming the part.
    """
    nodes = list(ast.walk(formula))
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    functions = {function.id for function in called if isinstance(function, ast.Name)}
    if unknown := sorted(functions - FUNCTIONS.keys()):
        raise ValueError(f"no function {listed(unknown)}; allowed: {', '.join(FUNCTIONS)}")
    methods = {function.attr for function in called if isinstance(function, ast.Attribute)}
    known = list(dict.fromkeys(name for names in METHODS.values() for name in names))
    if unknown := sorted(methods.difference(known)):
        raise ValueError(f"no method {listed(unknown)}; allowed: {', '.join(known)}")
    if any(isinstance(node, BITWISE) for node in nodes):
        raise ValueError("bitwise operators & | ^ ~ << >> are not allowed; write and, or, not, < or >")
    for node in nodes:
        stored = isinstance(getattr(node, "ctx", None), ast.Store)
        if isinstance(node, REFUSED) or (stored and not isinstance(node, ast.Name | ast.Tuple | ast.List)):
            raise ValueError(f"{ast.unparse(node)!r} is not allowed in a formula; data/README.md lists what is")


class Evaluator(EvalWithCompoundTypes):
    """Evaluates parsed formulas over `names`, the fields of a row."""

    def __init__(self) -> None:
        operators = {kind: self._counted(function, kind) for kind, function in DEFAULT_OPERATORS.items()}
        super().__init__(operators, dict(FUNCTIONS), allowed_attrs={})
        for kind in (ast.List, ast.Tuple, ast.Set, ast.Dict):
            self.nodes[kind] = self._counted_display(self.nodes[kind])

    def eval(self, expr: str, previously_parsed: ast.expr | None = None) -> Any:
        """Return the value of a formula.

        Raises:
            InvalidExpression: a part is not allowed, or the work exceeds WORK.
        """
        self._work = 0
        return super().eval(expr, previously_parsed)

    def _eval(self, node: ast.AST) -> Any:
        self._spend(STEP)
        return super()._eval(node)

    def _check_disallowed_items(self, item: Any) -> None:
        """Do nothing: a row holds only data, and checking all of it at each step is slow."""

    def _eval_call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Attribute):
            return super()._eval_call(node)
        owner, name = self._eval(node.func.value), node.func.attr
        if name not in METHODS.get(type(owner), ()):
            raise FeatureNotAvailable(f"no method {name} of {type(owner).__name__}")
        arguments = [self._eval(argument) for argument in node.args]
        named = dict(self._eval(keyword) for keyword in node.keywords)
        self._count([owner, *arguments, *named.values()])
        return getattr(owner, name)(*arguments, **named)

    def _eval_subscript(self, node: ast.Subscript) -> Any:
        container, key = self._eval(node.value), self._eval(node.slice)
        self._spend(_size(container)) if isinstance(key, slice) else self._count(key)
        return container[key]

    def _counted(self, function: Callable[..., Any], kind: type[ast.AST]) -> Callable[..., Any]:
        """Wrap an operator to count its work and bound its integers."""

        def compute(*operands: Any) -> Any:
            self._count(operands)
            if kind in OF_NUMBERS and any(isinstance(operand, CONTAINERS) for operand in operands):
                raise TypeError(f"{' and '.join(type(operand).__name__ for operand in operands)} are not numbers")
            bits = [operand.bit_length() for operand in operands if isinstance(operand, int)]
            if kind is ast.Pow and len(bits) == 2:
                bits.append(bits[0] * operands[1])
            if max(bits, default=0) > MAX_BITS:
                raise NumberTooHigh(f"a number of more than {MAX_BITS:,} bits")
            return function(*operands)

        return compute

    def _counted_display(self, display: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Wrap the evaluation of a display, such as `[x, x]`, to count its work."""

        def build(node: ast.expr) -> Any:
            value = display(node)
            self._count(value)  # shared parts count again: comparing and hashing read them again
            return value

        return build

    def _count(self, value: Any) -> None:
        """Add the work of reading a nested value."""
        self._spend(_size(value) if isinstance(value, str | bytes) else 1)
        if isinstance(value, dict):
            self._count_all(value.values())
        elif isinstance(value, list | tuple | set):
            self._count_all(value)

    def _count_all(self, values: Iterable[Any]) -> None:
        for value in values:
            self._count(value)

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > WORK:
            raise IterableTooLong("this takes too long")


def _size(value: Any) -> int:
    """Work of reading a text or list."""
    return 1 + len(value) // (CHARACTERS if isinstance(value, str | bytes) else 1)
