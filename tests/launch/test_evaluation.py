"""Questions of a task, answered and judged."""

import json
from pathlib import Path

import pytest

import data.tasks
from data import DataConfig
from data.config import TaskConfig
from data.tasks.equations import Equations
from data.tasks.rows import Rows
from diffllm.generate import Response
from diffllm.tokenizer import builtin_tokenizer
from launch import evaluation
from trainer import evaluation as engine
from trainer.config import Config
from trainer.evaluation import questions_of


def test_questions_that_cannot_be_used_are_named(small_model, tokenizer, tmp_path, monkeypatch, capsys):
    lines = ["{", '{"question": "1+1?", "answer": "<think></think>2"}', '{"question": "2"}']
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    config = Config()
    config.data.val_files, config.trainer.output_dir = [str(tmp_path / "test.jsonl")], str(tmp_path)
    config.sampling.max_new_tokens, config.sampling.steps = 2, 1
    monkeypatch.setattr(evaluation, "load_for_sampling", lambda *_: (small_model, tokenizer))
    with pytest.raises(ValueError, match=r"2 rows cannot be used:\n.*jsonl:1: .*\n.*jsonl:3: "):
        evaluation.evaluate(config)
    config.data.on_bad_row = "skip"
    evaluation.evaluate(config)
    said = capsys.readouterr().out
    assert "2 rows cannot be used:\n" in said
    assert "(0 of 1 questions)" in said


def test_the_questions_of_a_file_are_judged_by_their_answers(small_model, tokenizer, tmp_path, monkeypatch, capsys):
    rows = [
        {"question": "1+1?", "answer": "<think>\n</think>\n2"},
        {"question": "2+2?", "answer": "<think>\n</think>\n4.0"},
        {"question": "3+3?", "answer": "<think>\n</think>\n6"},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config()
    config.data.val_files = [str(tmp_path / "test.jsonl")]
    config.trainer.output_dir = str(tmp_path / "run")
    config.sampling.max_new_tokens, config.sampling.steps = 4, 2

    def answers(*_):
        for row_id, text in ((1, "<think></think>4"), (0, "2"), (2, "7")):  # in the order in which they are done
            yield Response(row_id, text, tokens=3, nfe=2, tokens_per_forward=1.5, ended=True)

    monkeypatch.setattr(evaluation, "load_for_sampling", lambda *_: (small_model, tokenizer))
    monkeypatch.setattr(engine, "generate", answers)
    evaluation.evaluate(config)
    record = json.loads(Path(tmp_path / "run" / "evaluation.json").read_text())
    assert [answer["right"] for answer in record["answers"]] == [True, True, False]
    assert record["answers"][1]["prompt"] == [{"role": "user", "content": "2+2?"}]
    assert record["scores"]["exact_match"] == 2 / 3
    assert record["scores"]["tokens_per_second"] > 0
    assert record["config"]["data"]["val_files"] == config.data.val_files
    assert "exact match 66.7% (2 of 3 questions)" in capsys.readouterr().out


def test_fields_that_mean_something_reach_the_questions(small_model, tmp_path, monkeypatch):
    tokenizer = builtin_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    row = {"query": "1+1?", "reply": "2", "system": "Add.", "tools": [{"name": "add"}], "reasoning": "One and one."}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    config = DataConfig(val_files=[str(tmp_path / "test.jsonl")], columns={"prompt": "query", "response": "reply"})
    task = Rows(config)
    [question] = questions_of(task, tokenizer, seed=0)
    chat = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(question.ids) == f'[{{"name": "add"}}]{chat}'
    assert task.reference(question.row) == "<think>\nOne and one.\n</think>\n2"


@pytest.mark.parametrize(("size", "count"), [(100, 100), (0.5, 275), (550, 550)])
def test_a_subset_of_the_questions(tokenizer, size, count):
    every = [question.row.place for question in questions_of(Equations(), tokenizer, seed=1)]
    some = questions_of(Equations(DataConfig(subset=size)), tokenizer, seed=1)
    places = [question.row.place for question in some]
    assert len(places) == count
    assert places == [place for place in every if place in {*places}]
    other = questions_of(Equations(DataConfig(subset=size)), tokenizer, seed=2)
    assert (places == [question.row.place for question in other]) == (count == len(every))


def test_a_subset_larger_than_the_questions(tokenizer):
    with pytest.raises(ValueError, match=r"data\.subset=551: selects 551 of 550 rows; give a share"):
        questions_of(Equations(DataConfig(subset=551)), tokenizer, seed=0)


def test_an_evaluation_of_a_subset(small_model, tokenizer, tmp_path, monkeypatch):
    config = Config(data=DataConfig(subset=3))
    config.trainer.output_dir = str(tmp_path)
    config.sampling.max_new_tokens, config.sampling.steps = 2, 1
    monkeypatch.setattr(evaluation, "load_for_sampling", lambda *_: (small_model, tokenizer))
    evaluation.evaluate(config)
    assert json.loads((tmp_path / "evaluation.json").read_text())["scores"]["questions"] == 3


@pytest.mark.parametrize("completion", [" 4", [{"role": "assistant", "content": " 4"}]])
def test_a_completion_is_a_response(tokenizer, tmp_path, completion):
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "2+2?", "completion": completion}) + "\n")
    task = Rows(DataConfig(val_files=[str(tmp_path / "test.jsonl")]))
    [question] = questions_of(task, tokenizer, seed=0)
    assert (task.score(question.row, "4"), task.score(question.row, "5")) == (1, 0)


ECHO = """
from data import PlacedRow
from data.tasks.base import Task

class Echo(Task):
    name = "echo"
    def rows(self, split):
        return [PlacedRow({"text": f"{split} {i}"}, f"echo {i}") for i in range(3)]
    def messages(self, row):
        return [{"role": "user", "content": row.row["text"]}]
    def reference(self, row):
        return row.row["text"]
    def score(self, row, response):
        return len(response) / len(row.row["text"])
"""


def test_a_new_task_is_one_file(small_model, tokenizer, tmp_path, monkeypatch):
    """Nothing else knows it."""
    (tmp_path / "echo_task.py").write_text(ECHO)
    monkeypatch.setattr(data.tasks, "__path__", [*data.tasks.__path__, str(tmp_path)])
    monkeypatch.setattr(evaluation, "load_for_sampling", lambda *_: (small_model, tokenizer))
    prompts = []

    def answers(model, tokenizer, ids, config, row_ids):
        prompts.extend(map(tokenizer.decode, ids))
        return (Response(row_id, "test 1"[: 6 * row_id], 1, 1, 1.0, True) for row_id in row_ids)

    monkeypatch.setattr(engine, "generate", answers)
    config = Config(task=TaskConfig(["echo"]))
    config.trainer.output_dir = str(tmp_path / "run")
    evaluation.evaluate(config)
    assert prompts == [f"<|im_start|>user\ntest {i}<|im_end|>\n<|im_start|>assistant\n" for i in range(3)]
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [answer["right"] for answer in record["answers"]] == [False, True, True]
    assert [answer["expected"] for answer in record["answers"]] == ["test 0", "test 1", "test 2"]


@pytest.mark.parametrize("kind", ["choose", "likelihood"])
def test_only_generated_answers_are_evaluated(monkeypatch, kind):
    monkeypatch.setattr(Equations, "kind", kind)
    with pytest.raises(ValueError, match=rf"task\.name=equations: its kind is {kind}; .*generate"):
        evaluation.evaluate(Config())
