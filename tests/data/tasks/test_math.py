"""Mathematical problems, judged with and without math-verify."""

import json

import pytest

from data import PlacedRow
from data.chat import to_chat
from data.config import TaskConfig
from data.tasks import math
from data.tasks.math import Math

MATH = {
    "problem": "Solve $x^2=8$ for $x>0$.",
    "solution": r"We get $x=\boxed{2\sqrt{2}}$.",
    "answer": r"2\sqrt{2}",
    "subject": "Algebra",
    "level": 1,
}
S1K = {"question": "1+1?", "answer": "<think>\nOne and one.\n</think>\nAdding, we get $\\boxed{2}$ for 1 + 1."}


def rows_of(tmp_path, *rows) -> tuple[Math, list[PlacedRow]]:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Math(settings=TaskConfig(files={"math": str(tmp_path / "test.jsonl")}))
    return task, list(task.rows("test"))


@pytest.fixture(params=["strict normaliser", "math-verify"])
def judge(request, monkeypatch):
    if request.param == "math-verify":
        pytest.importorskip("math_verify", reason="formulas are compared by math-verify")
    else:
        monkeypatch.setattr(math, "installed", lambda _: None)
        monkeypatch.setattr(math, "Symbolic", lambda: None)
    return request.param


def test_the_judge_is_named_and_formulas_need_math_verify(tmp_path, judge):
    task, [row] = rows_of(tmp_path, MATH)
    assert task.judge.startswith(judge)
    algebra = float(judge == "math-verify")
    verdicts = {r"\boxed{2\sqrt{2}}": 1, r"The answer is $2 \sqrt 2$.": algebra, r"\boxed{\sqrt{8}}": algebra, "2": 0}
    assert {response: task.score(row, response) for response in verdicts} == verdicts


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (MATH, r"2\sqrt{2}"),
        ({name: MATH[name] for name in ("problem", "solution")}, r"2\sqrt{2}"),
        ({name: MATH[name] for name in ("problem", "answer")}, r"2\sqrt{2}"),
        ({"problem": "?", "solution": "Eve wins.", "answer": r"\text{Eve}"}, r"\text{Eve}"),
        ({"problem": "?", "answer": 70}, "70"),
        ({"question": "?", "answer": "It is even.\n#### 4"}, "4"),
        ({"prompt": "?", "response": "So the answer is 4."}, "4"),
        (S1K, "2"),
    ],
)
def test_the_answer_is_found_in_the_reference(tmp_path, judge, row, expected):
    task, [placed] = rows_of(tmp_path, row)
    task.check(placed)
    assert task.expected(placed) == expected
    assert task.score(placed, f"<think>5</think>\nSo it is \\boxed{{{expected}}}.") == 1
    assert task.score(placed, "\\boxed{5}") == 0


@pytest.mark.parametrize(
    ("response", "right"),
    [("-2, 1", 1), ("x=1 or x=-2", 1), ("1, -2", 1), ("1, 1, -2", 0), ("(1,-2)", 0), ("1", 0)],
)
def test_math_verify_changes_no_verdict_on_a_list_of_numbers(tmp_path, judge, response, right):
    task, [row] = rows_of(tmp_path, {"problem": "?", "answer": "1,-2"})
    assert task.score(row, rf"\boxed{{{response}}}") == right


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so x = 3", "x = 3"),
        ("Eve wins.", "Eve wins."),
        ("No solution", "No solution"),
        ("Sorry, but I can not tell you.", None),
        ("I do not know", None),
        ("I’m not sure.", None),
        (r"\boxed{3", None),
    ],
)
def test_a_long_text_is_no_answer(response, answer):
    assert Math().answer(f"<think>hm</think>{response}") == answer


def test_rows_are_chats_to_train_on(tmp_path):
    _, rows = rows_of(tmp_path, MATH, S1K)
    prompts, responses = zip(*((chat["prompt"], chat["response"]) for chat in map(to_chat, rows)), strict=True)
    assert [prompt[0]["content"] for prompt in prompts] == [MATH["problem"], S1K["question"]]
    assert responses == (MATH["solution"], S1K["answer"])


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "Prove it.", "solution": "It is even.\nSo 2 divides it."},
        {"question": "Prove it.", "answer": "<think>\n</think>\nIt is even, which was to be shown."},
        {"question": "Prove it.", "answer": "It is even, which was to be shown."},
        {"problem": "1+1?", "solution": r"We get \boxed{2"},
    ],
)
def test_a_reference_without_an_answer_is_named(tmp_path, row):
    task, [placed] = rows_of(tmp_path, row)
    with pytest.raises(ValueError, match=r"test\.jsonl:1: the reference states no answer"):
        task.check(placed)


def test_the_default_is_the_hub(monkeypatch):
    read = []
    monkeypatch.setattr(Math, "read", lambda _, files: read.extend(files) or [])
    assert list(Math().rows("test")) == []
    assert read == ["HuggingFaceH4/MATH-500:test"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"problem": "1+1?", "solution": r"\boxed{2}", "answer": "3"}, "'3', but the solution states '2'"),
        ({"problem": "1+1?", "answer": True}, "'answer' is True"),
        ({"problem": "1+1?", "answer": float("nan")}, "'answer' is nan"),
        ({"problem": "1+1?", "question": "1+2?", "answer": "2"}, "'problem' and 'question' differ"),
    ],
    ids=str,
)
def test_rows_that_contradict_themselves_are_refused(tmp_path, judge, row, words):
    task, rows = rows_of(tmp_path, row)
    with pytest.raises(ValueError, match=words):
        task.check(rows[0]) if rows else task.bad.refuse()


def test_a_solution_may_write_its_answer_in_another_way(tmp_path, judge):
    task, [row] = rows_of(tmp_path, MATH | {"answer": r"\sqrt{8}"})
    task.check(row)


@pytest.mark.parametrize(("expected", "answer", "right"), [("Yes", "yes", 1), ("AB", "ab", 0), ("Eve", "Even", 0)])
def test_a_text_may_begin_with_a_capital(tmp_path, judge, expected, answer, right):
    task, [row] = rows_of(tmp_path, {"problem": "?", "answer": rf"\text{{{expected}}}"})
    assert task.score(row, rf"\boxed{{\text{{{answer}}}}}") == right


def test_a_rounded_formula_is_wrong(tmp_path, judge):
    task, [row] = rows_of(tmp_path, MATH | {"solution": None, "answer": r"2\pi"})
    assert [task.score(row, rf"\boxed{{{number}}}") for number in ("6.283185", "6.28318530718")] == [0, 0]
