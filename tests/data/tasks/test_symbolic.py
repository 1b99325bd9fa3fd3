"""Formulas compared by math-verify in a process of its own, and the differences that it must not see."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from data.tasks import symbolic
from data.tasks.normal import formulas
from data.tasks.symbolic import Symbolic


@pytest.fixture
def compare():
    pytest.importorskip("math_verify", reason="formulas are compared by math-verify")
    compare = Symbolic()
    yield compare
    compare.close()


SAME = [
    ("2 * sqrt(3)", r"2\sqrt3"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("-q+p", "p - q"),
    ("(x+1)^2", "x^2+2x+1"),
    ("2^{10}", "1024"),
    ("π/2", r"\frac{\pi}{2}"),
    ("5, 3", "3,5"),
    (r"1, \sqrt{8}", r"2\sqrt{2}, 1"),
    (r"(\sqrt{8}, \sqrt{8})", r"(2\sqrt{2}, 2\sqrt{2})"),
    (r"2\sqrt{3}\text{ cm}", r"2\sqrt{3}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("y = x + x", "y = 2x"),
    (r"-2 \le x \le 7", "[-2,7]"),
    (r"(2,\infty)", "x > 2"),
]
DIFFERENT = [
    ("5x", "5"),
    ("x - 2", "2 - x"),
    ("3", r"\pm 3"),
    ("5,6", "5"),
    ("(5,3)", "(3,5)"),
    ("z = 2x", "y = 2x"),
    (r"-2 \le x \le 7", "(-2,7)"),
    ("x < 2", r"(2,\infty)"),
    (r"2\sqrt{3}\text{ cm}", r"2\sqrt{3}\text{ m}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("x^", "x"),
]


def test_formulas(compare):
    for pairs, same in ((SAME, True), (DIFFERENT, False)):
        verdicts = {pair: compare(*formulas(*pair)) for pair in pairs}
        assert verdicts == dict.fromkeys(pairs, same)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("0.333333", r"\frac13"),  # numbers are exact
        ("siraP", "Paris"),  # not a product of letters
        ("on", "no"),
        ("B", "(A)"),
        ("52_9", "52_8"),
        (r"\{3,5\}", "(3,5)"),
        (r"2\sqrt{3} feet", r"2\sqrt{3} miles"),
        ("2x or 3x", "2x"),
        ("x, x, 2", "x, 2, 2"),
        (r"\{x, x, 2\}", r"\{x, 2\}"),
        ("x + 2 = 4x", "4x"),
        ("1" * 2000, "x"),
    ],
)
def test_answers_that_algebra_must_not_judge(answer, expected):
    assert formulas(answer, expected) is None


def test_a_formula_that_takes_for_ever_is_not_the_same(compare, monkeypatch):
    monkeypatch.setattr(symbolic, "SECONDS", 0.2)
    assert not compare("9^{9^{9^{9}}}", "5")
    monkeypatch.setattr(symbolic, "SECONDS", 5)
    assert compare("x+x", "2x")


def test_any_thread_may_compare(compare):
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(compare, ["x+x", "x+1", "2*x", "x"], ["2x"] * 4)) == [True, False, True, False]


def test_a_library_that_does_not_start_is_named(monkeypatch, tmp_path):
    program = tmp_path / "broken.py"
    program.write_text("import math_verify_is_broken")
    monkeypatch.setattr(symbolic, "__file__", str(program))
    with pytest.raises(ValueError, match=r"No module named 'math_verify_is_broken'.*diffllm\[math\]"):
        Symbolic()("x", "y")
