"""GSM8K from published and converted rows."""

import json

import pytest

from data import PlacedRow
from data.config import TaskConfig
from data.convert import RAW_SETS, convert
from data.tasks.gsm8k import Gsm8k

RAW = {"question": "2 ducks lay 9 eggs each?", "answer": "They lay 2*9=<<2*9=18>>18 eggs.\n#### 18"}
NO_ANSWER = {"question": "2 ducks?", "answer": "They lay eggs."}


def task(tmp_path, *rows, name="test.jsonl", files=None) -> Gsm8k:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Gsm8k(settings=TaskConfig(files={"gsm8k": files or str(tmp_path / name)}))


def test_published_and_converted_rows_are_the_same_questions(tmp_path):
    converted = convert(PlacedRow(RAW, "train:1"), RAW_SETS["gsm8k"])
    gsm8k = task(tmp_path, RAW, converted)
    raw, other = gsm8k.rows("test")
    assert raw.row == other.row == converted
    assert raw.place == f"{tmp_path}/test.jsonl:1"
    gsm8k.check(raw)
    assert gsm8k.messages(raw) == [{"role": "user", "content": RAW["question"]}]
    assert gsm8k.reference(raw) == "<think>\nThey lay 2*9=18 eggs.\n</think>\n18"
    assert gsm8k.expected(raw) == "18"


def test_final_numbers_are_judged(tmp_path):
    gsm8k = task(tmp_path, RAW)
    [row] = gsm8k.rows("test")
    verdicts = {"#### 18": 1, "<think>9*2</think>\n**18** eggs": 1, "The answer is 19.": 0, "I do not know.": 0}
    assert {response: gsm8k.score(row, response) for response in verdicts} == verdicts
    assert [gsm8k.answer(response) for response in verdicts] == ["18", "18", "19", None]


def test_rows_without_an_answer_are_named(tmp_path):
    gsm8k = task(tmp_path, NO_ANSWER, RAW)
    assert [row.place for row in gsm8k.rows("test")] == [f"{tmp_path}/test.jsonl:2"]
    assert gsm8k.bad.named == [f"{tmp_path}/test.jsonl:1: field 'answer' has no #### before the final answer"]


def test_a_folder_has_both_splits_and_a_file_only_test_rows(tmp_path):
    task(tmp_path, RAW, RAW, name="train.jsonl")
    gsm8k = task(tmp_path, RAW, files=str(tmp_path))
    assert [len(list(gsm8k.rows(split))) for split in ("train", "test")] == [2, 1]
    with pytest.raises(ValueError, match=r"task\.files\.gsm8k=.*test\.jsonl: .*data\.train_files"):
        list(task(tmp_path, RAW).rows("train"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_default_is_the_hub(monkeypatch, split):
    read = []
    monkeypatch.setattr(Gsm8k, "read", lambda _, files: read.extend(files) or [PlacedRow(RAW, "hub:1")])
    assert len(list(Gsm8k().rows(split))) == 1
    assert read == [f"openai/gsm8k/main:{split}"]
