"""Sudoku of 4 × 4 cells: generated problems, rows of files, and which responses solve a problem."""

import json

import pytest

from data import DataConfig, PlacedRow
from data.config import TaskConfig
from data.tasks.sudoku4 import Sudoku4, solutions

ROW = PlacedRow({"metadata": {"problem": "1003\n0300\n3210\n4132"}}, "row 1")


def test_there_are_288_grids():
    assert len({tuple(grid) for grid in solutions().tolist()}) == len(solutions()) == 288


def test_generated_problems_have_one_solution_and_are_not_among_the_test_rows():
    task = Sudoku4(settings=TaskConfig(train_rows=300))
    train, test = list(task.rows("train")), list(task.rows("test"))
    assert (len(train), len(test)) == (300, 500)
    assert not {task.key(row.row) for row in train} & {task.key(row.row) for row in test}
    for row in [*train, *test]:
        task.check(row)
        cells = [int(cell) for cell in row.row["metadata"]["problem"].replace("\n", "")]
        given = [i for i, cell in enumerate(cells) if cell]
        assert sum(all(grid[i] == cells[i] for i in given) for grid in solutions().tolist()) == 1


def test_rows_of_a_file_are_held_out_of_training(tmp_path):
    first = next(Sudoku4().rows("train")).row
    rows = [{"input": first["metadata"]["problem"], "output": first["response"]}, {"input": "1003\n0300\n3210\n4132"}]
    rows += [{"input": "1003"}, {"output": "1423\n2341\n3214\n4132"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Sudoku4(DataConfig(), TaskConfig(files={"sudoku4": str(tmp_path / "test.jsonl")}, train_rows=20))
    assert first not in [row.row for row in task.rows("train")]
    assert task.overlap.count == 1
    test = list(task.rows("test"))
    assert [row.row["response"] for row in test] == [first["response"], ""]
    for row in test:
        task.check(row)
        assert task.messages(row) == [{"role": "user", "content": row.row["prompt"]}]
    assert ["'input'" in problem for problem in task.bad.named] == [True] * len(task.bad.named)


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("1423\n2341\n3214\n4132", 1),
        ("1423\n2341\n3214\n4132\n\nEach row has 1-4 exactly once.", 1),
        ("Row 1: 1 4 2 3\nRow 2: 2 3 4 1\nRow 3: 3 2 1 4\nRow 4: 4 1 3 2", 1),
        ("1 4 | 2 3\n2 3 | 4 1\n----+----\n3 2 | 1 4\n4 1 | 3 2", 1),
        ("1423\n2341\n3214\n4132\n\nNo:\n1423\n2341\n3214\n4123", 0),
        ("1 4 2 3\n2 3 4 1\n3 2 1 4\n4 1 3 2", 1),
        ("The 4x4 grid is\n| 1 4 2 3 |\n| 2 3 4 1 |\n| 3 2 1 4 |\n| 4 1 3 2 |", 1),
        ("1423\n2341\n3214\n4123", 0),
        ("1423\n4132\n2341\n3214", 0),
        ("1423\n2341\n3214", 0),
        ("1003\n0300\n3210\n4132", 0),
        ("", 0),
    ],
)
def test_a_response_solves_the_problem_or_not(response, score):
    assert Sudoku4().score(ROW, response) == score


def test_the_answer_is_the_last_16_digits():
    responses = ("The 4x4 grid is\n1423\n2341\n3214\n4132", "I do not know", "1423\n2341\n3214")
    assert [Sudoku4().answer(response) for response in responses] == ["1423234132144132", None, None]
