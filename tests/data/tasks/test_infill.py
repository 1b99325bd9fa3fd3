"""Rows to infill: their slots and scores."""

import json

import pytest

from data import PlacedRow
from data.config import TaskConfig
from data.tasks.infill import Infill

ROW = {"prefix": "Solve 3x+", "middle": "5=20 ", "suffix": "<think>"}


def row(**fields) -> PlacedRow:
    return PlacedRow(ROW | fields, "rows:1")


@pytest.mark.parametrize(
    ("slot", "fields", "length"),
    [(None, {}, 4), ("3", {}, 3), ("2-6", {}, "2-6"), ("2-6", {"slot": 7}, 7), (None, {"slot": "1-2"}, "1-2")],
)
def test_the_length_of_a_slot(tokenizer, slot, fields, length):
    """By the row, by the setting, or by the text that is missing."""
    assert len(tokenizer(ROW["middle"])["input_ids"]) == 4
    task = Infill(settings=TaskConfig(slot=slot))
    assert task.template(row(**fields), tokenizer) == f"Solve 3x+<|mask:{length}|><think>"


@pytest.mark.parametrize(
    ("response", "right", "similarity"),
    [("5=20 ", 1, 1), ("5=20", 1, 8 / 9), ("5=21 ", 0, 0.8), ("", 0, 0), ("abc", 0, 0)],
)
def test_scores(response, right, similarity):
    task = Infill()
    assert task.score(row(), response) == right
    assert task.metrics(row(), response) == {"edit_similarity": pytest.approx(similarity)}
    assert task.answer(response) == (response.strip() or None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prefix": None}, "field 'prefix' must be text, not null"),
        ({"suffix": 3}, "field 'suffix' must be text, not int"),
        ({"middle": None}, "field 'middle' must be text, not null"),
        ({"middle": ""}, "field 'middle' is empty"),
        ({"middle": " \n"}, "field 'middle' is empty"),
        ({"suffix": "<|mask:3|>"}, "would be taken for a slot"),
    ],
)
def test_rows_that_cannot_be_used(tokenizer, fields, words):
    with pytest.raises(ValueError, match=f"^rows:1: .*{words}"):
        Infill().template(row(**fields), tokenizer)


def test_rows_come_from_a_file(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    task = Infill(settings=TaskConfig(files={"infill": str(tmp_path / "test.jsonl")}))
    [placed] = task.rows("test")
    task.check(placed)
    with pytest.raises(ValueError, match=r"task\.name=infill: it has test rows only"):
        task.rows("train")
    with pytest.raises(ValueError, match=r"task\.name=infill: .* task\.files\.infill=FILE"):
        Infill().rows("test")
