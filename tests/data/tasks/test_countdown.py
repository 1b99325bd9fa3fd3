"""Countdown: generated problems, rows of files, and which responses solve a problem."""

import json
import re
from itertools import islice

import pytest

from data import DataConfig, PlacedRow
from data.chat import final_answer
from data.config import TaskConfig
from data.tasks.countdown import Countdown

ROW = PlacedRow({"metadata": {"numbers": [15, 44, 79], "target": 50}}, "row 1")


@pytest.mark.parametrize("numbers", [3, 4, 5])
def test_generated_problems_are_solved_and_not_among_the_test_rows(numbers):
    task = Countdown(settings=TaskConfig(train_rows=300, numbers=numbers))
    train, test = list(task.rows("train")), list(task.rows("test"))
    assert (len(train), len(test)) == (300, 500)
    assert not {task.key(row.row) for row in train} & {task.key(row.row) for row in test}
    assert train == list(task.rows("train"))
    for row in [*train, *test]:
        task.check(row)
        assert len(row.row["metadata"]["numbers"]) == numbers
        assert 10 <= row.row["metadata"]["target"] <= 99


def test_rows_of_a_file_are_held_out_of_training(tmp_path):
    generated = [row.row["metadata"] for row in Countdown(settings=TaskConfig(train_rows=20)).rows("train")]
    rows = [{"input": ",".join(map(str, [*each["numbers"][::-1], each["target"]]))} for each in generated[:5]]
    rows += [
        {"input": "15,44,79,50", "output": "44-15=29,79-29=50"},
        {"nums": [2, 3, 4, 1], "target": 24, "output": None},
    ]
    rows += [{"input": "15,44,x"}, {"numbers": [1, 2, 3]}, {"input": "50,50"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Countdown(DataConfig(), TaskConfig(files={"countdown": str(tmp_path / "test.jsonl")}, train_rows=20))
    train, test = list(task.rows("train")), list(task.rows("test"))
    assert (len(train), len(test), task.overlap.count) == (20, 7, 5)
    assert not {task.key(row.row) for row in train} & {task.key(row.row) for row in test}
    assert [final_answer(row.row["response"]) for row in test[5:]] == ["44-15=29\n79-29=50", ""]
    for row in test:
        task.check(row)
        assert task.messages(row) == [{"role": "user", "content": row.row["prompt"]}]
    assert "test.jsonl:8" in task.bad.named[0]
    assert "input='15,44,79,50'" in task.bad.named[1]
    assert "two numbers" in task.bad.named[2]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("44-15=29\n79-29=50", 1),
        ("44-15=29, 79-29=50", 1),
        ("44 − 15 = 29; 79 − 29 = 50", 1),
        ("79-(44-15)", 1),
        ("79 - (44 - 15) = 50", 1),
        ("We try 79-44=35, which fails. The answer is (79 - 44) + 15", 1),
        ("<think>\n79+15=94\n</think>\n44-15=29\n79-29=50", 1),
        (r"$79 - (44 - 15)$", 1),
        (r"\boxed{79 - [44 - 15]}", 1),
        ("1) 44-15=29\n2) 79-29=50", 1),
        ("79-(44-15)=50\n\nCheck: 79-29=50", 1),
        ("44-15=" + "2" * 5000, 0),
        ("44-15=29\n79-29=51", 0),
        ("44-15=28\n79-29=50", 0),
        ("79-29=50", 0),
        ("44+6=50", 0),
        ("44-15=29\n79-29=50\n50*1=50", 0),
        ("79-44+15+79-79", 0),
        ("79-44/0", 0),
        ("79**44", 0),
        ("50", 0),
        ("", 0),
        ("((((((", 0),
    ],
)
def test_a_response_solves_the_problem_or_not(response, score):
    assert Countdown().score(ROW, response) == score


def test_products_as_models_write_them():
    row = PlacedRow({"metadata": {"numbers": [3, 4, 5], "target": 35}}, "row 1")
    for response in (r"(3 + 4) \times 5 = 35", r"$(3+4) \cdot 5$", "(3+4) x 5 = 35", "(3+4)×5"):
        assert Countdown().score(row, response) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"numbers": [3, 4.9, 5], "target": 35},
        {"numbers": [3, 4, 5], "target": 35.7},
        {"numbers": "345", "target": 35},
        {"numbers": [True, 2], "target": 3},
        {"numbers": [3, 4, float("inf")], "target": 35},
        {"numbers": [3, 4, 5]},
        {"input": "3,4,5,35", "numbers": [3, 4, 6], "target": 35},
        {"input": 35, "numbers": [3, 4, 5], "target": 35},
        {"input": "3,4,5,35", "output": ["3+4=7"]},
        {"input": "3,4,5,35", "output": "3+4=7,7*4=28"},
    ],
    ids=str,
)
def test_rows_of_doubtful_problems_are_refused(row):
    with pytest.raises(ValueError, match=r"^row 1: "):
        Countdown().convert(PlacedRow(row, "row 1"))


@pytest.mark.parametrize(
    ("response", "answer"),
    [("<think>1+2</think>79 − 44 or (79-44)+15 = 50", "(79-44)+15"), ("I do not know", None), ("50", None)],
)
def test_the_answer_is_the_last_expression(response, answer):
    assert Countdown().answer(response) == answer


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("3-5=-2\n-2+10=8", 1),
        ("3-5=-2\n10+-2=8", 1),
        ("3-5=-2\n2+10=8", 0),
        ("- 3+10=13\n- 13-5=8", 1),
        ("-(3+5)+10", 0),
    ],
)
def test_a_result_may_be_negative(response, score):
    row = PlacedRow({"metadata": {"numbers": [3, 5, 10], "target": 8}}, "row 1")
    assert Countdown().score(row, response) == score


def test_a_fraction_may_occur_on_the_way():
    row = PlacedRow({"metadata": {"numbers": [3, 2, 8], "target": 12}}, "row 1")
    assert Countdown().score(row, "3/2*8") == 1
    assert Countdown().score(row, "3/(2*8)") == 0


def test_thinking_of_three_numbers_shows_what_solves_them():
    half = r"(\d+),(\d+):\+(\d+|_)-(\d+|_)\*(\d+|_)/(\d+|_)"
    lengths = set()
    for placed in islice(Countdown(settings=TaskConfig(numbers=3)).rows("train"), 300):
        numbers, target = placed.row["metadata"]["numbers"], placed.row["metadata"]["target"]
        thinking, response = placed.row["response"].removeprefix("<think>\n").split("\n</think>\n")
        found = []
        for line in thinking.split("\n"):
            *halves, both = re.fullmatch(rf"{half} {half}=(\d+|_)", line).groups()
            for x, y, *results in (map(int_or_none, halves[:6]), map(int_or_none, halves[6:])):
                assert results == [x + y, abs(x - y) or None, x * y if x * y < 1000 else None, quotient(x, y)]
            first, last = halves[2:6], halves[8:]
            assert both in (first if set(first) & set(last) - {"_"} else "_")
            assert both in (*last, "_")
            assert sorted(map(int, (halves[0], halves[1], halves[6]))) == sorted(numbers)
            assert int(halves[7]) == target
            found.append(both)
        solved = next(both for both in found if both != "_")
        assert response.split("\n")[0].endswith(f"={solved}")
        assert Countdown().score(placed, response) == 1
        lengths.add(len(re.findall(r"\d+|\D", placed.row["response"])))
    assert len(found) == 3
    assert len(lengths) == 1


def int_or_none(text):
    return None if text == "_" else int(text)


def quotient(x, y):
    return max(x, y) // min(x, y) if max(x, y) % min(x, y) == 0 else None


@pytest.mark.parametrize(
    ("problem", "steps"),
    [
        ("15,44,79,50", "44-15=29\n79-29=50"),
        ("2,3,50,45", "3+2=5\n50-5=45"),
        ("2,3,4,4", "3-2=1\n1*4=4"),
        ("6,4,48,2", "6*4=24\n48/24=2"),
        ("5,4,9,81", "5+4=9\n9*9=81"),
        ("20,4,95,19", "20/4=5\n95/5=19"),
        ("6,3,2,9", "6*3=18\n18/2=9"),
        ("5,95,10,10", "95+5=100\n100/10=10"),
    ],
)
def test_steps_follow_from_the_thinking(problem, steps):
    row = Countdown().convert(PlacedRow({"input": problem}, "row 1"))
    assert final_answer(row["response"]) == steps


def test_an_unsolved_problem_has_the_response_of_its_row():
    row = {"input": "99,98,97,9605", "output": "99*98=9702,9702-97=9605"}
    assert Countdown().convert(PlacedRow(row, "row 1"))["response"] == "99*98=9702\n9702-97=9605"


def test_more_numbers_have_no_thinking():
    row = next(Countdown(settings=TaskConfig(numbers=4)).rows("train"))
    assert "<think>" not in row.row["response"]
