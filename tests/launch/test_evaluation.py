"""Questions of a task, answered and judged."""

import json
from pathlib import Path

import pytest

import data.tasks
from data import DataConfig
from data.config import TaskConfig
from data.tasks.equations import Equations
from data.tasks.rows import Rows
from diffllm.generate import Response, generate
from diffllm.tokenizer import builtin_tokenizer
from launch import evaluation
from launch.results import interval
from trainer import evaluation as engine
from trainer.config import Config, to_dict
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
    assert "0 of 1 " in said


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
    answered, scores = record["answers"]["rows"], record["scores"]["rows"]
    assert [answer["right"] for answer in answered] == [True, True, False]
    assert answered[1]["prompt"] == [{"role": "user", "content": "2+2?"}]
    assert scores["exact_match"] == 2 / 3
    assert scores["tokens_per_second"] > 0
    assert record["config"]["data"]["val_files"] == config.data.val_files
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rows  ")]
    assert line.split()[1:5] == ["2", "of", "3", "66.7%"]


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
    assert json.loads((tmp_path / "evaluation.json").read_text())["scores"]["equations"]["questions"] == 3


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
    assert [answer["right"] for answer in record["answers"]["echo"]] == [False, True, True]
    assert [answer["expected"] for answer in record["answers"]["echo"]] == ["test 0", "test 1", "test 2"]


CHOICES = [{"question": "1+1?", "options": ["1", "2"], "answer": "B"}, {"question": "2+2?", "options": ["4", "3"]}]


@pytest.fixture
def several(small_model, tokenizer, tmp_path, monkeypatch) -> Config:
    """Two equations, a choice beside a row that cannot be used, and a slot."""
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    (tmp_path / "infill.jsonl").write_text('{"prefix": "1+1=", "middle": "2", "suffix": ";"}\n')
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("choice", "infill")}
    config = Config(task=TaskConfig(["equations", *files], files, mc_num=4))
    config.data.on_bad_row, config.trainer.output_dir = "skip", str(tmp_path / "run")
    config.sampling.max_new_tokens = 4
    rows = Equations().rows("test")[:2]
    monkeypatch.setattr(Equations, "rows", lambda *_: rows)
    monkeypatch.setattr(evaluation, "load_for_sampling", lambda *_: (small_model, tokenizer))
    return config


def result(config: Config, name: str = "evaluation.json") -> dict:
    return json.loads((Path(config.trainer.output_dir) / name).read_text())


def test_several_tasks_have_one_result_with_everything_it_depends_on(several, monkeypatch, capsys):
    answers = [Response(0, "7", 2, 2, 1.0, True), Response(1, "</think>", 4, 1, 4.0, False)]
    monkeypatch.setattr(engine, "generate", lambda *_: iter(answers))
    evaluation.evaluate(several)
    record, right = result(several), Equations().rows("test")[0].row["answer"].endswith("\n7")
    assert [*record["scores"]] == [*record["answers"]] == ["equations", "choice", "infill"]
    assert record["scores"]["equations"] == {
        "questions": 2, "skipped": 0, "right": right, "exact_match": right / 2,
        "interval": interval(right, 2), "not_ended": 0.5, "no_answer": 0.5, "nfe": 1.5,
        "tokens_per_forward": 2.5, "tokens_per_second": record["scores"]["equations"]["tokens_per_second"],
    }  # fmt: skip
    scores, [chosen] = record["scores"]["choice"], record["answers"]["choice"]
    assert (scores["questions"], scores["skipped"], scores["tokens_per_forward"]) == (1, 1, None)
    assert chosen["options"] == ["1", "2"]
    assert chosen["right"] == (chosen["best"] == 1)
    assert scores["exact_match_per_token"] == (chosen["best_per_token"] == 1)
    assert record["answers"]["infill"][0]["prompt"] == "1+1=<|mask:1|>;"
    assert record["scores"]["infill"]["edit_similarity"] == record["answers"]["infill"][0]["metrics"]["edit_similarity"]
    assert record["judges"] == {"equations": "strict normaliser", "choice": "exact", "infill": "exact"}
    assert record["config"] == to_dict(several)
    assert (record["ranks"], record["dtype"], record["origin"]["task.mc_num"]) == (1, "float32", 4)
    origin = [name for name in record["origin"] if not name.startswith(("sampling.", "task."))]
    rows = [f"rows of {name}" for name in record["scores"]]
    assert {*origin} == {*rows, *(f"{name} in tokens" for name in rows), "the model's weights", "the tokenizer"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-5:-1]] == ["task", *record["scores"]]


def test_the_rows_of_a_result_do_not_depend_on_the_tokenizer(several, tokenizer):
    questions = {"equations": questions_of(Equations(), tokenizer, seed=0)}
    others = {"equations": [question._replace(ids=question.ids + 1) for question in questions["equations"]]}
    model = evaluation.load_for_sampling()[0]
    one, other = (engine.origin_of(each, several.sampling, model, tokenizer) for each in (questions, others))
    assert [name for name in one if one[name] != other[name]] == ["rows of equations in tokens"]


def test_an_evaluation_is_not_repeated_and_another_is_kept(several, monkeypatch, capsys):
    evaluation.evaluate(several)
    first, sampled = result(several), []
    monkeypatch.setattr(engine, "generate", lambda *given: sampled.extend(given[-1]) or generate(*given))
    several.sampling.batch_size = 1
    capsys.readouterr()
    evaluation.evaluate(several)
    assert sampled == []
    assert result(several) == first
    _, done, *table = capsys.readouterr().out.splitlines()
    assert "evaluation.json has this evaluation already" in done
    assert [line.split()[0] for line in table] == ["task", *first["scores"]]

    for number, name in enumerate(("evaluation.1.json", "evaluation.2.json")):
        several.sampling.steps = 2 + number
        evaluation.evaluate(several)
        assert result(several)["config"]["sampling"]["steps"] == 2 + number
        assert result(several, name)["config"]["sampling"]["steps"] == [None, 2][number]
        said = capsys.readouterr().out
        assert f"{name}: sampling.steps was {[None, 2][number]} and is {2 + number}\n" in said
    assert result(several, "evaluation.1.json") == first


def test_another_judge_or_version_is_another_evaluation(several, monkeypatch):
    evaluation.evaluate(several)
    monkeypatch.setattr(Equations, "judge", "strict 2")
    evaluation.evaluate(several)
    monkeypatch.setattr(evaluation, "versions", lambda: {"torch": "9"})
    evaluation.evaluate(several)
    files = [result(several, name) for name in ("evaluation.1.json", "evaluation.2.json", "evaluation.json")]
    assert [record["judges"]["equations"] for record in files] == ["strict normaliser", "strict 2", "strict 2"]
    assert files[2]["versions"]["torch"] == "9"


def test_a_damaged_evaluation_is_kept_and_repeated(several, capsys):
    evaluation.evaluate(several)
    first, file = result(several), Path(several.trainer.output_dir) / "evaluation.json"
    file.write_text(json.dumps(first | {"versions": None}))
    evaluation.evaluate(several)
    assert result(several, "evaluation.1.json")["versions"] is None
    assert result(several)["scores"].keys() == first["scores"].keys()


def test_an_interruption_names_the_score_so_far(several, monkeypatch):
    def interrupted(*_):
        yield Response(0, Equations().rows("test")[0].row["answer"], 1, 1, 1.0, True)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        evaluation.evaluate(several)
    assert stopped.value.args == ("equations: 1 of 1 right so far", "run the same command to resume")
    monkeypatch.setattr(engine, "choose_options", interrupted)
    monkeypatch.setattr(engine, "generate", lambda *_: iter([Response(1, "", 1, 1, 1.0, True)]))
    with pytest.raises(KeyboardInterrupt) as stopped:
        evaluation.evaluate(several)
    assert stopped.value.args[:2] == ("equations: 1 of 2 right so far", "choice: 0 of 1 right so far")


def test_an_evaluation_is_not_resumed_on_another_device_or_version(several, monkeypatch):
    def interrupted(*_):
        yield Response(0, "7", 1, 1, 1.0, True)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(several)
    versions = evaluation.versions()
    assert "ranks" not in result(several, "evaluation.json.partial/run.json")
    monkeypatch.setattr(evaluation, "versions", lambda: versions | {"torch": "9"})
    monkeypatch.setattr(evaluation, "device_name", lambda _: "another")
    with pytest.raises(ValueError, match=r"device was .* and is another; version of torch was .* and is 9\. Give"):
        evaluation.evaluate(several)


def test_a_reference_without_an_answer_is_counted_and_one_with_more_is_kept(
    small_model, tokenizer, tmp_path, monkeypatch, capsys
):
    references = [r"As 1+1 is two, \boxed{2}.", "2", "First this,\nthen that."]
    rows = [{"prompt": "?", "response": reference} for reference in references]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(data=DataConfig(val_files=[str(tmp_path / "test.jsonl")]))
    config.trainer.output_dir = str(tmp_path / "run")
    monkeypatch.setattr(evaluation, "load_for_sampling", lambda *_: (small_model, tokenizer))
    monkeypatch.setattr(engine, "generate", lambda *_: (Response(i, "2", 1, 1, 1.0, True) for i in range(3)))
    evaluation.evaluate(config)
    assert capsys.readouterr().out.startswith("rows: 1 of 3 references state no answer")
    answers = result(config)["answers"]["rows"]
    assert [answer["expected"] for answer in answers] == ["2", "2", references[2]]
    assert [answer.get("reference") for answer in answers] == [references[0], None, None]


def test_responses_without_an_answer_are_named(several, monkeypatch, capsys):
    monkeypatch.setattr(engine, "generate", lambda *_: (Response(i, " ", 4, 1, 4.0, False) for i in range(2)))
    evaluation.evaluate(several)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert line.startswith("warning: equations: no response has an answer")
    assert "100% were cut at sampling.max_new_tokens=4" in line


@pytest.mark.parametrize(("ended", "warned"), [((False, False), True), ((True, False), False)])
def test_responses_that_are_mostly_cut_are_named(several, monkeypatch, capsys, ended, warned):
    monkeypatch.setattr(engine, "generate", lambda *_: (Response(i, "7", 4, 1, 4.0, ended[i]) for i in range(2)))
    evaluation.evaluate(several)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: equations")]
    assert ["100% were cut" in line for line in lines] == [True] * warned


def test_a_task_by_default_is_named_in_the_result(several, monkeypatch):
    monkeypatch.setattr(engine, "generate", lambda *_: (Response(i, "7", 4, 1, 4.0, True) for i in range(2)))
    several.task = TaskConfig()
    evaluation.evaluate(several)
    assert result(several)["config"]["task"]["name"] == ["equations"]


def test_files_that_no_task_reads_are_refused():
    config = Config(data=DataConfig(val_files=["test.jsonl"]), task=TaskConfig(["equations"]))
    with pytest.raises(ValueError, match=r"data\.val_files=\['test\.jsonl'\] with .* task\.files\.equations=FILE"):
        evaluation.evaluate(config)


def test_measures_of_a_task_are_averaged(several, monkeypatch):
    monkeypatch.setattr(Equations, "metrics", lambda self, row, response: {"length": len(response)})
    answers = [Response(0, "7", 2, 2, 1.0, True), Response(1, "777", 4, 1, 4.0, True)]
    monkeypatch.setattr(engine, "generate", lambda *_: iter(answers))
    evaluation.evaluate(several)
    assert result(several)["scores"]["equations"]["length"] == 2
    assert [answer["metrics"] for answer in result(several)["answers"]["equations"]] == [{"length": 1}, {"length": 3}]
