"""Tasks: found by name, rows without overlap, answers scored."""

import json

import pytest

import data.tasks
from data import DataConfig, PlacedRow
from data.config import TaskConfig
from data.tasks import find_task, tasks_of
from data.tasks.choice import Choice
from data.tasks.equations import Equations
from data.tasks.normal import is_same
from data.tasks.rows import Rows

USER = {"role": "user", "content": "2+2?"}


def test_tasks_are_found_by_their_names():
    assert (find_task("equations"), find_task("rows")) == (Equations, Rows)
    with pytest.raises(ValueError, match=r"task\.name=equatons: .*did you mean equations\?"):
        find_task("equatons")


def test_several_tasks():
    settings = TaskConfig(["choice", "equations"], {"choice": "a.jsonl"})
    choice, equations = tasks_of(DataConfig(), settings)
    assert (type(choice), type(equations), choice.file()) == (Choice, Equations, "a.jsonl")
    assert [type(task) for task in tasks_of(DataConfig(), TaskConfig())] == [Equations]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (TaskConfig(["rows", "rows"]), "rows given twice"),
        (TaskConfig(["choice"], {"chioce": "a"}), r"task\.files\.chioce: .*did you mean choice\?"),
        (TaskConfig([], {"choice": "a"}), r"task\.files\.choice: not among the tasks .* known are equations"),
        (TaskConfig(["rows"], {"rows": "a"}), r"task\.files\.rows=a: .*data\.val_files"),
        (TaskConfig([], {"equations": "a"}), r"task\.files\.equations=a: .*no file"),
    ],
)
def test_wrong_lists_of_tasks(settings, words):
    with pytest.raises(ValueError, match=words):
        tasks_of(DataConfig(), settings)


@pytest.mark.parametrize("samples", [0, 3])
def test_masks_are_drawn_in_pairs(samples):
    with pytest.raises(ValueError, match=f"task.mc_num={samples}: must be"):
        TaskConfig(mc_num=samples)


def test_two_tasks_cannot_have_one_name(monkeypatch):
    monkeypatch.setattr("data.tasks.rows.Other", type("Other", (Rows,), {"name": "equations"}), raising=False)
    with pytest.raises(ValueError, match="equations given twice"):
        find_task("rows")


@pytest.mark.parametrize(
    ("text", "error"), [("import nowhere", ImportError), ("from data.tasks.base import Task\nclass A(Task): ...", None)]
)
def test_other_modules_of_the_package(tmp_path, monkeypatch, text, error):
    """A broken one is not skipped in silence; one without a name is no task."""
    (tmp_path / "other_module.py").write_text(text)
    monkeypatch.setattr(data.tasks, "__path__", [*data.tasks.__path__, str(tmp_path)])
    with pytest.raises(error or ValueError, match="nowhere" if error else "task.name=A: no such task"):
        find_task("A")


def test_equations_are_solved_right_and_split_without_overlap(tokenizer):
    task = Equations()
    train, held_out = task.rows("train"), task.rows("test")
    questions = [row.row["question"] for row in train + held_out]
    assert len(set(questions)) == len(questions) > 1000
    assert len(held_out) >= 200
    assert train == task.rows("train")
    for placed in train + held_out:
        row = placed.row
        left, c = row["question"].removeprefix("Solve ").split("=")
        x = int(row["answer"].rpartition("\n")[2])
        a, rest = left.split("x")
        assert int(a or 1) * x + int(rest) == int(c)
        thinking = row["answer"].removeprefix("<think>").partition("</think>")[0]
        assert len(tokenizer(thinking)["input_ids"]) == row["thinking_tokens"]
        for line in thinking.split():
            expression, value = line.split("=")
            assert eval(expression) == int(value)
        assert task.score(placed, row["answer"]) == 1
        assert task.score(placed, row["answer"] + "0") == 0


def test_rows_are_those_of_the_split(tmp_path):
    for name in ("train", "val"):
        rows = [{"query": f"{name}?", "response": "4"}, {"query": "b", "prompt": "c"}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig([str(tmp_path / "train.jsonl")], [str(tmp_path / "val.jsonl")], columns={"prompt": "query"})
    for split, name in (("train", "train"), ("test", "val")):
        task = Rows(config)
        assert list(task.rows(split)) == [({"prompt": f"{name}?", "response": "4"}, f"{tmp_path / name}.jsonl:1")]
        assert task.bad.count == 1
    config.columns = {"prompt": "qery"}
    with pytest.raises(ValueError, match="no row has a column 'qery'; did you mean query"):
        list(Rows(config).rows("test"))
    with pytest.raises(ValueError, match=r"task\.name=rows with data\.val_files=\[\]"):
        list(Rows().rows("test"))


@pytest.mark.parametrize(
    ("expected", "given", "right"),
    [
        ("72", "<think>\n71\n</think>\n72", True),
        ("1,200", "$1200.00", True),
        ("1200", "1201", False),
        ("$5", "5", True),
        ("-3", "3", False),
        ("Paris", "Paris", True),
        ("Paris", "paris", False),
        ("72", "72 apples", True),
        ("72", "", False),
        ("3,5", "35", False),
        ("1,23", "12,3", False),
        ("9007199254740993", "9007199254740992", False),
    ],
)
def test_answers_are_compared_as_numbers_or_as_text(expected, given, right):
    assert is_same(given.rpartition("</think>")[2], expected) is right
    for row in (
        {"question": "?", "answer": f"<think></think>\n{expected}"},
        {"prompt": "?", "response": expected},
        {"messages": [USER, {"role": "assistant", "content": expected}]},
    ):
        assert Rows().score(PlacedRow(row, "rows:1"), given) == right


SOLUTION = {"question": "1+1?", "answer": "<think>\nhm\n</think>\nWe add 1 and 1.\nThis gives $\\boxed{2}$."}
PROSE = {"prompt": "Why?", "response": "Born in 1912,\nhe knew why."}


@pytest.mark.parametrize(
    ("row", "response", "right"),
    [
        (SOLUTION, "2", True),
        (SOLUTION, "We add 1 and 1.", False),
        (PROSE, "<think></think>Born in 1912,\nhe knew why", True),
        (PROSE, "1912", False),
    ],
)
def test_a_reference_is_a_solution_or_free_text(row, response, right):
    placed = PlacedRow(row, "rows:1")
    Rows().check(placed)
    assert Rows().score(placed, response) == right


def test_a_reference_that_states_no_answer_is_told_from_others():
    made = {"prompt": "?", "response": "1+1", "source": "reasoning_gym/countdown"}
    rows = [PlacedRow(row, "rows:1") for row in (SOLUTION, PROSE, PROSE | made)]
    assert [Rows().states_answer(row) for row in rows] == [True, False, True]
    judged = type("Judged", (Equations,), {"score": lambda *_: 1.0})
    assert [task.states_answer(rows[1]) for task in (Equations(), judged())] == [False, True]


def test_shares_without_an_answer_are_of_what_is_judged():
    responses = ("<think>1</think>x = 3", "Paris", "<think>1", r"\boxed{3", "")
    assert [Equations().answer(response) for response in responses] == ["x = 3", None, None, None, None]
    assert [Rows().answer(response) for response in responses] == ["x = 3", "Paris", None, None, None]
