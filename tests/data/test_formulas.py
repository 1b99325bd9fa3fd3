"""Formulas of data.filter and data.difficulty: what they may hold, in bounded time, and no row is changed."""

import copy
import json
import resource

import pytest
from omegaconf import OmegaConf

from data.curation import Expression
from data.evaluator import METHODS
from tests.conftest import ROOT, no_longer_than

ROW = {
    "question": "a b " * 50_000,
    "n": 3,
    "digits": 10**4000,
    "items": list(range(50_000)),
    "level": {"name": "hard"},
    "messages": [{"role": "user", "content": "x" * 1000}] * 50,
    "deep": json.loads("[" * 900 + "]" * 900),
}


def value_of(text, kind=bool):
    return Expression(text, "data.filter", kind)(ROW, "rows:1")


@pytest.mark.parametrize(
    "formula",
    [
        "messages[0]['role'] == 'user' and level.get('name') == 'hard' and level.get('x') is None",
        "len([m for m in messages if 'x' in m['content'].lower()]) == 50",
        "level['name'] in {'hard', 'easy'} and {'hard': 1}[level['name']] == 1",
        "-n < 0 and n % 2 == 1 and n // 2 == 1 and 2 ** n == 8 and n / 2 == 1.5 and 2 * n - 1 == 5",
        "('a' + 'b').upper() == 'AB' and [1] + [2] == [1, 2] and len(question.split()) == 100000",
        "question.startswith('a') if n else digits > 1",
        "[n for n in [1]] == [1] and n == 3",
    ],
)
def test_what_a_formula_may_hold(formula):
    assert value_of(formula) is True


@pytest.mark.parametrize("kind", [bool, float])
@pytest.mark.parametrize(
    "formula",
    [
        "4000000 ** 4000000",
        "9 ** 9 ** 9",
        "2.0 ** 100000",
        "digits ** 4",
        "digits * digits * digits",
        "0x" + "f" * 100_000 + " * 2",
        "len([e for a in [2**9000] for b in [a*a] for c in [b*b] for d in [c*c] for e in [d*d]])",
        "'a' * 10**9",
        "10**9 * [1]",
        "[[0] * 1000] * 1000",
        "items + items + items + items",
        "'{:>1000000000}'.format(1)",
        "f'{n:>1000000000}'",
        "'%1000000000d' % n",
        *(f"question.{method}(10**9)" for method in ("ljust", "rjust", "center", "zfill", "expandtabs")),
        "question.replace('a', question)",
        "question.join(items)",
        "question.encode()",
        "len([1 for a in question for b in question for c in question])",
        "len([1 for a in items for b in items])",
        "len({a: b for a in items for b in items})",
        "len([question[1:] for i in items[:9000]])",
        "len([question.lower() for i in items[:9000]])",
        "len([question.split() for i in items[:9000]])",
        "len([1 for i in items[:9000] if 'c' in question])",
        "len([1 for i in items[:9000] if items == [j for j in items[:9000]]])",
        "range(10**9)",
        "deep == [deep]",
        "not " * 3000 + "n",
        "n" + " + 1" * 5000,
        "(" * 300 + "n" + ")" * 300,
    ],
)
def test_a_formula_that_would_take_long(formula, kind):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with no_longer_than(10), pytest.raises(ValueError, match=r"data\.filter="):
        value_of(formula, kind)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


@pytest.mark.parametrize(
    "part",
    ["x + x", *(pytest.param(each, marks=pytest.mark.slow) for each in ("[x, x]", "(x, x)", "{'a': x, 'b': x}"))],
)
def test_what_doubles_at_each_level(part):
    """Little memory holds what a comparison would go over for ever."""
    levels = " ".join(f"for x in [{part}]" for _ in range(60))
    with no_longer_than(10), pytest.raises(ValueError, match="too l"):
        value_of(f"[x for x in [[n]] {levels}] == [1]")


@pytest.mark.parametrize(
    "formula",
    [
        *(f"messages.{call}" for call in ("pop()", "append(1)", "clear()", "extend(items)", "reverse()", "sort()")),
        *(f"level.{call}" for call in ("update(level)", "pop('name')", "clear()", "setdefault('a', 1)", "popitem()")),
        "(n := 4) > 3",
        "[0 for messages[0] in [5]]",
        "[0 for level.name in [5]]",
        "[0 for [a, *b] in [items]]",
        "(lambda: 1)()",
        "[*items]",
        "len(*[items])",
        "[level.clear][0]()",
        "level.name == 'hard'",
        "question.__class__",
        "[i for i in [1]].append(2)",
    ],
)
def test_no_row_is_changed(formula):
    before = copy.deepcopy(ROW["messages"]), dict(ROW["level"]), ROW["n"]
    with pytest.raises(ValueError, match=r"data\.filter="):
        value_of(formula)
    assert (ROW["messages"], ROW["level"], ROW["n"]) == before


def test_an_unknown_method_is_answered_with_the_allowed_ones():
    with pytest.raises(ValueError, match=r"^data\.filter=.*no method replace.*startswith"):
        value_of("question.replace('a', 'b') == 'b'")
    with pytest.raises(ValueError, match="no method lower of int"):
        value_of("n.lower() == 'a'")
    assert {"startswith", "endswith", "lower", "upper", "strip", "split", "count", "find"} <= set(METHODS[str])


@pytest.mark.parametrize("error", [MemoryError, OverflowError, RecursionError])
def test_errors_of_the_interpreter_are_of_the_row(error, monkeypatch):
    def fail(*_, **__):
        raise error

    formula = Expression("n > 1", "data.difficulty", bool)
    monkeypatch.setattr(formula._evaluator, "eval", fail)
    with pytest.raises(ValueError, match=rf"^rows:1: data\.difficulty='n > 1': {error.__name__}"):
        formula(ROW, "rows:1")


@pytest.mark.parametrize(
    ("source", "is_kept"), [(None, False), ("USACO", True), ("a/livecodebench", True), ("math", False)]
)
def test_rows_of_code_may_have_no_source(source, is_kept):
    formula = OmegaConf.load(ROOT / "conf" / "data" / "s1k_code.yaml").filter
    assert Expression(formula, "data.filter", bool)({"source": source}, "rows:1") == is_kept
