"""Rows of multiple choice: where the options and the right one stand."""

import json

import pytest

from data import PlacedRow
from data.config import TaskConfig
from data.tasks.choice import Choice

COLOURS = ["red", "green", "blue"]


def row(**fields) -> PlacedRow:
    return PlacedRow({"question": "Which?", **fields}, "rows:1")


@pytest.mark.parametrize(
    ("fields", "right"),
    [
        ({"options": COLOURS, "answer": 1}, "green"),
        ({"choices": COLOURS, "answer": "C"}, "blue"),
        ({"choices": COLOURS, "answer": " red "}, "red"),
        ({"choices": {"text": COLOURS, "label": ["A", "B", "C"]}, "answer": "B"}, "green"),
        ({"choices": {"text": ["2", "1", "3"], "label": ["1", "2", "3"]}, "answer": "1"}, "2"),  # a label before a text
        ({"choices": {"text": COLOURS}, "answer": "A"}, "red"),
        ({"options": ["A", "B"], "answer": "A"}, "A"),  # both readings mean the same
        ({"options": ["1", "2"], "answer": "1"}, "1"),  # a text is no index
        ({"options": COLOURS, "choices": None, "answer": 2}, "blue"),
        ({"options": COLOURS, "answer": 1, "answerKey": "B", "response": "green"}, "green"),
        ({"choices": {"text": COLOURS, "label": ["A", "B", "C"]}, "answer": None, "answerKey": "B"}, "green"),
        ({"choices": {"text": COLOURS, "label": ["A", "B", "C"]}, "answer": 1}, "green"),
        ({"choices": {"text": COLOURS, "label": [1, 2, 3]}, "answerKey": "3"}, "blue"),
        ({"choices": {"text": COLOURS, "label": [0, 1, 2]}, "answer": 2}, "blue"),
    ],
)
def test_the_right_option(fields, right):
    task, placed = Choice(), row(**fields)
    assert task.reference(placed) == right
    task.check(placed)
    assert [task.score(placed, option) for option in task.options(placed)].count(1) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"choices": {"text": COLOURS, "label": ["1", "2", "3"]}, "answer": 1}, "another option's label"),
        ({"choices": {"text": COLOURS, "label": [1, 2, 3]}, "answer": 1}, "another option's label"),
        ({"options": COLOURS, "answer": 1, "answerKey": 2}, "'answer': 1, 'answerKey': 2"),
        ({"answer": 0}, "options or choices; it has neither"),
        ({"options": COLOURS, "choices": COLOURS, "answer": 0}, "it has options and choices"),
        ({"options": "red", "answer": 0}, "field 'options' must be a list of texts"),
        ({"options": ["red", 3], "answer": 0}, "field 'options' must be a list of texts"),
        ({"options": ["red", " "], "answer": 0}, "field 'options' must be a list of texts"),
        ({"choices": {"label": ["A"]}, "answer": 0}, "field 'choices' must be a list of texts"),
        ({"options": ["red"], "answer": 0}, "has 1 options"),
        ({"options": ["red", "red"], "answer": 0}, "no two alike"),
        ({"choices": {"text": COLOURS, "label": ["A"]}, "answer": 0}, "one for each of the 3 texts"),
        ({"options": COLOURS, "answer": 0, "response": "blue"}, "'answer': 0, 'response': 'blue'"),
        ({"options": COLOURS}, "field 'answer' must be .*, not null"),
        ({"options": COLOURS, "answer": True}, "field 'answer' must be .*, not bool"),
        ({"options": COLOURS, "answer": 3}, r"field 'answer' is 3, .* 0 … 2"),
        ({"options": COLOURS, "answer": -1}, "field 'answer' is -1"),
        ({"options": COLOURS, "answer": "D"}, "is 'D', which is none of the options"),
        ({"options": ["B", "A"], "answer": "A"}, "is 'A', which is two options"),
    ],
)
def test_rows_that_cannot_be_used(fields, words):
    with pytest.raises(ValueError, match=f"^rows:1: .*{words}"):
        Choice().check(row(**fields))


def test_question_and_prompt_agree():
    placed = row(prompt="Which?", options=COLOURS, answer=0)
    assert Choice().messages(placed) == [{"role": "user", "content": "Which?"}]
    with pytest.raises(ValueError, match=r"^rows:1: .*'question' and 'prompt' differ"):
        Choice().messages(row(prompt="Who?", options=COLOURS, answer=0))


def test_rows_come_from_a_file(tmp_path):
    fields = {"options": COLOURS, "answer": 1}
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "Which?", **fields}) + "\n{\n")
    task = Choice(settings=TaskConfig(files={"choice": str(tmp_path / "test.jsonl")}))
    for _ in range(2):  # a bad row is counted once
        [placed] = task.rows("test")
        assert task.bad.count == 1
    assert task.messages(placed) == [{"role": "user", "content": "Which?"}]
    with pytest.raises(ValueError, match=r"task\.name=choice: it has test rows only"):
        task.rows("train")
    with pytest.raises(ValueError, match=r"task\.name=choice: .* task\.files\.choice=FILE"):
        Choice().rows("test")
