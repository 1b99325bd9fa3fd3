"""Rows made to order, and their verifiers. A user's file may hold such rows."""

import json

import pytest

from data import PlacedRow
from data.tasks.reasoning_gym import DIFFICULTY, generated_rows
from data.tasks.rows import Rows

COUNTDOWN = {"question": "?", "answer": "<think></think>1+1", "source": "reasoning_gym/countdown", "metadata": {}}


def score(row: dict, response: str) -> float:
    return Rows().score(PlacedRow(row, "rows:1"), response)


@pytest.mark.parametrize("task", DIFFICULTY)
def test_generated_tasks_with_their_verifiers(task):
    pytest.importorskip("reasoning_gym", reason="generated tasks need reasoning-gym")
    rows = [placed.row for placed in generated_rows(task, 4, seed=3)]
    assert rows == [placed.row for placed in generated_rows(task, 4, seed=3)]
    assert rows != [placed.row for placed in generated_rows(task, 4, seed=4)]
    for row in json.loads(json.dumps(rows)):  # as they are read from a file
        Rows().check(PlacedRow(row, "made"))
        assert score(row, "<think></think>\nno idea") < 1
        assert row["difficulty"] > 0


def test_the_judge_names_the_library_of_the_verifiers(monkeypatch):
    monkeypatch.setattr("data.tasks.rows.installed", {"reasoning-gym": "9"}.get)
    assert Rows().judge == "strict normaliser, reasoning-gym 9"
    monkeypatch.setattr("data.tasks.rows.installed", {}.get)
    assert Rows().judge == "strict normaliser"


def test_another_solution_is_right_too():
    pytest.importorskip("reasoning_gym", reason="generated tasks need reasoning-gym")
    row = next(generated_rows("countdown", 1, seed=3)).row
    *_, answer = row["answer"].splitlines()
    assert score(row, f"<think></think>\n({answer})") == 1


@pytest.mark.parametrize("answer", ["9**9**9**9", "print(1)", "1+" * 100 + "1"])
def test_what_is_no_formula_is_not_computed(answer, monkeypatch):
    monkeypatch.setattr("data.tasks.reasoning_gym._gym", None)
    assert score(COUNTDOWN, f"<think></think>{answer}") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "reasoning_gym/other"}, "other"),
        ({"metadata": None}, "field 'metadata' is missing"),
        ({"answer": "<think></think>2", "metadata": {"numbers": [1, 1], "target": 2}}, r"0.05 in task\.name=rows"),
    ],
)
def test_a_row_that_nothing_is_right_for_is_refused(changes, message):
    pytest.importorskip("reasoning_gym", reason="generated tasks need reasoning-gym")
    with pytest.raises(ValueError, match=rf"^test:1: .*{message}"):
        Rows().check(PlacedRow(COUNTDOWN | changes, "test:1"))
