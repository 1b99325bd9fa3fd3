"""Raw sets into training rows."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from data import PlacedRow
from data.chat import to_chat
from data.convert import RAW_SETS, convert
from data.prepare import main

USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
THOUGHT = "<think>\nTwo twos.\n</think>\n4"


@pytest.mark.parametrize(
    ("name", "raw", "response"),
    [
        (
            "s1k",
            {"question": "2+2?", "thinking_trajectories": [" Two twos.\n"], "attempt": "4\n", "source_type": "math"},
            THOUGHT,
        ),
        (
            "s1k",
            {
                "question": "2+2?",
                "deepseek_thinking_trajectory": "Two twos.",
                "deepseek_attempt": "4",
                "gemini_attempt": "5",
                "source_type": "math",
                "cot_type": "math",
            },
            THOUGHT,
        ),
        ("s1k", {"question": "2+2?", "answer": THOUGHT, "source": "math"}, THOUGHT),
        ("messages", {"conversations": None, "messages": [USER, ASSISTANT]}, "4"),
        ("gsm8k", {"question": "2+2?", "answer": "Two twos<<2+2=4>>.\n#### 4"}, THOUGHT),
        ("alpaca", {"instruction": "Add.", "input": "2 and 2", "output": "4"}, "4"),
        ("alpaca", {"instruction": "Add 2 and 2.", "input": "", "output": "4"}, "4"),
        ("messages", {"id": "a", "messages": [USER, ASSISTANT]}, "4"),
        ("messages", {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, "4"),
        ("messages", {"conversations": [USER, ASSISTANT]}, "4"),
        ("sharegpt", {"messages": [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": "4"}]}, "4"),
        ("prompt_response", {"prompt": "2+2?", "response": "4"}, "4"),
        ("prompt_response", {"prompt": [USER], "response": "4", "split": "a"}, "4"),
        ("prompt_response", {"prompt": "2+2?", "completion": "4"}, "4"),
        ("prompt_response", {"prompt": [USER], "completion": [ASSISTANT]}, "4"),
    ],
)
def test_raw_rows_become_training_rows(name, raw, response):
    chat = to_chat(PlacedRow(convert(PlacedRow(raw, "raw:1"), RAW_SETS[name]), "raw:1"))
    assert chat["response"] == response
    assert chat["prompt"][-1]["role"] == "user"


def converted(name, raw):
    return convert(PlacedRow(raw, "raw:1"), RAW_SETS[name])


def test_fields_for_curation_stay_and_other_attempts_go():
    raw = {"question": "2+2?", "thinking_trajectories": ["So."], "attempt": "4", "cot_type": "math", "solution": "4"}
    row = converted("s1k", raw | {"gemini_attempt": "5", "deepseek_grade": "Yes", "source_type": "AIME"})
    others = {"cot_type", "solution", "deepseek_grade", "source_type"}
    assert row.keys() == {"question", "answer", "source", "subject"} | others
    assert (row["source"], row["subject"]) == ("AIME", "math")


def test_what_comes_before_the_question_is_in_the_prompt():
    system = {"role": "system", "content": "Be brief."}
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    assert (
        converted("messages", {"system": "Be brief.", "messages": [system, USER, ASSISTANT]})["messages"][0] == system
    )
    with pytest.raises(ValueError, match="raw:1: field 'system' and the system message"):
        converted("messages", {"system": "Be long.", "messages": [system, USER, ASSISTANT]})
    row = converted("sharegpt", {"system": "Be brief.", "conversations": turns})
    assert row["messages"] == [system, USER, ASSISTANT]
    raw = {"instruction": "And 3+3?", "output": "6", "system": "Be brief.", "history": [["2+2?", "4"]]}
    row = converted("alpaca", raw)
    assert row == {"prompt": [system, USER, ASSISTANT, {"role": "user", "content": "And 3+3?"}], "response": "6"}


RAW = {
    "s1k": {"question": "2+2?", "thinking_trajectories": ["Two twos."], "attempt": "4"},
    "gsm8k": {"question": "2+2?", "answer": "Two twos.\n#### 4"},
    "alpaca": {"instruction": "2+2?", "output": "4"},
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "prompt_response": {"prompt": "2+2?", "response": "4"},
}

DEEPSEEK = {"question": "2+2?", "deepseek_thinking_trajectory": "Two twos.", "deepseek_attempt": "4"}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("field", ["system", "system_prompt", "system_message"])
def test_a_system_message_of_a_row_comes_first(name, field):
    chat = to_chat(PlacedRow(converted(name, RAW[name] | {field: "Be brief."}), "made:1"))
    assert chat["prompt"] == [{"role": "system", "content": "Be brief."}, USER]
    assert to_chat(PlacedRow(converted(name, RAW[name] | {field: None}), "made:1"))["prompt"] == [USER]


@pytest.mark.parametrize("name", RAW)
def test_what_means_something_is_not_lost_in_conversion(name):
    tools = [{"name": "add"}]
    assert to_chat(PlacedRow(converted(name, RAW[name] | {"tools": tools}), "made:1"))["tools"] == tools
    with pytest.raises(ValueError, match="raw:1: field 'images'"):
        converted(name, RAW[name] | {"images": ["a.png"]})


def test_the_weight_of_a_turn_stays():
    turns = [*RAW["sharegpt"]["conversations"], {"from": "human", "value": "3+3?"}]
    turns.append({"from": "gpt", "value": "7", "weight": 0})
    chat = to_chat(PlacedRow(converted("sharegpt", {"conversations": turns}), "made:1"))
    assert chat == {"prompt": [USER], "response": "4"}


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("s1k", "question"),
        ("s1k", "attempt"),
        ("s1k", "answer"),
        ("gsm8k", "question"),
        ("gsm8k", "answer"),
        ("alpaca", "instruction"),
        ("alpaca", "input"),
        ("alpaca", "output"),
        ("prompt_response", "prompt"),
        ("prompt_response", "response"),
        *((name, "system") for name in RAW),
    ],
)
def test_a_number_where_text_belongs(name, field):
    with pytest.raises(ValueError, match=f"^raw:1: field '{field}' must be text, not int$"):
        converted(name, RAW[name] | {field: 3})


@pytest.mark.parametrize("value", [None, 3, 0.5, {}])
@pytest.mark.parametrize(
    ("name", "field", "row"),
    [
        ("alpaca", "output", lambda value: {"instruction": "a", "output": value}),
        ("gsm8k", "answer", lambda value: {"question": "a", "answer": value}),
        ("s1k", "thinking_trajectories", lambda value: RAW["s1k"] | {"thinking_trajectories": [value]}),
        ("s1k", "deepseek_attempt", lambda value: DEEPSEEK | {"deepseek_attempt": value}),
        ("s1k", "deepseek_thinking_trajectory", lambda value: DEEPSEEK | {"deepseek_thinking_trajectory": value}),
        ("prompt_response", "content", lambda value: {"prompt": [USER | {"content": value}], "response": "4"}),
        ("sharegpt", "value", lambda value: {"conversations": [{"from": "human", "value": value}]}),
        ("alpaca", "history", lambda value: RAW["alpaca"] | {"history": [["a", value]]}),
        ("sharegpt", "from", lambda value: {"conversations": [{"from": value, "value": "a"}]}),
        ("messages", "content", lambda value: {"messages": [USER, {"role": "assistant", "content": value}]}),
    ],
)
def test_what_is_no_text_where_text_belongs(name, field, row, value):
    kind = "null" if value is None else type(value).__name__
    with pytest.raises(ValueError, match=rf"^raw:1: .*field '{field}' must be text, not {kind}$"):
        converted(name, row(value))


def test_dolly_is_a_kind_of_alpaca():
    row = converted("alpaca", {"instruction": "Who?", "context": "Ann sang.", "response": "Ann", "category": "qa"})
    assert row == {"prompt": [{"role": "user", "content": "Who?\n\nAnn sang."}], "response": "Ann", "category": "qa"}


def test_the_first_line_of_an_answer_keeps_its_indentation():
    row = converted("s1k", RAW["s1k"] | {"attempt": "\n    return 4\n"})
    assert row["answer"] == "<think>\nTwo twos.\n</think>\n    return 4"


def test_an_input_follows_its_instruction():
    row = converted("alpaca", {"instruction": "Add.", "input": "2 and 2", "output": "4"})
    assert row["prompt"][0]["content"] == "Add.\n\n2 and 2"


@pytest.mark.parametrize(
    ("name", "more", "unused"),
    [
        (
            "s1k",
            {"gemini_attempt": "5", "cot": "a", "solution": "4", "cot_type": "math"},
            "gemini_attempt, cot, solution",
        ),
        ("s1k", {"messages": [USER, ASSISTANT], "prompt": "3+3?"}, "messages, prompt"),
        ("s1k", {"answer": THOUGHT}, "thinking_trajectories, attempt"),
        ("s1k", {"answer": THOUGHT, "messages": [USER, ASSISTANT]}, "thinking_trajectories, attempt, messages"),
        ("s1k", DEEPSEEK, "thinking_trajectories, attempt"),
        ("s1k", {"cot": None, "id": ""}, ""),
        ("gsm8k", {"prompt": "3+3?", "messages": [USER], "response": "6"}, "prompt, messages, response"),
        ("gsm8k", {"source": "mine", "difficulty": 9}, ""),
        ("alpaca", {"prompt": "3+3?", "messages": [USER], "category": "qa"}, "prompt, messages, category"),
        ("alpaca", {"input": "2 and 2", "history": [["a", "b"]], "system": "Be brief."}, ""),
        ("messages", {"id": 3, "prompt": "3+3?"}, "id, prompt"),
        ("messages", {"messages": [USER | {"name": "Ann"}, ASSISTANT]}, "messages[].name"),
        ("sharegpt", {"system": "Be brief.", "question": "3+3?"}, "question"),
        ("prompt_response", {"messages": [USER, ASSISTANT], "id": 0}, "messages, id"),
    ],
)
def test_columns_that_were_not_used_are_listed(name, more, unused, tmp_path, capsys):
    (tmp_path / "raw.jsonl").write_text(json.dumps(RAW[name] | more))
    main([name, str(tmp_path / "out.jsonl"), str(tmp_path / "raw.jsonl")])
    line = f"  columns that were not used: {unused}\n"
    assert (line in capsys.readouterr().out) if unused else ("not used" not in capsys.readouterr().out)
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert to_chat(PlacedRow(row, "made:1"))["prompt"][-1]["content"].startswith("2+2?")


@pytest.mark.parametrize(
    ("name", "more", "fields"),
    [
        ("sharegpt", {"messages": [USER, ASSISTANT]}, "'conversations' and 'messages'"),
        ("s1k", {"answer": "5"}, "'attempt' and 'answer'"),
        ("s1k", {**DEEPSEEK, "answer": "5"}, "'deepseek_attempt' and 'answer'"),
        ("alpaca", {"response": "5"}, "'output' and 'response'"),
        ("prompt_response", {"completion": "5"}, "'response' and 'completion'"),
    ],
)
def test_two_sources_of_the_same(name, more, fields):
    with pytest.raises(ValueError, match=f"^raw:1: fields {fields} differ"):
        converted(name, RAW[name] | more)


@pytest.mark.parametrize(("field", "value"), [("source", "mine"), ("difficulty", 0)])
def test_gsm8k_keeps_what_a_row_has(field, value):
    assert converted("gsm8k", RAW["gsm8k"])[field] == {"source": "gsm8k", "difficulty": 1}[field]
    assert converted("gsm8k", RAW["gsm8k"] | {field: value})[field] == value


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("gsm8k", {"question": "2+2?", "answer": "4"}, "raw:1: field 'answer' has no ####"),
        ("gsm8k", {"question": "2+2?"}, "raw:1: field 'answer' is missing; its fields are: question"),
        ("gsm8k", {"question": "", "answer": "a #### 4"}, "raw:1: field 'question' is empty"),
        ("gsm8k", {"question": "2+2?", "answer": 4}, "raw:1: "),
        ("s1k", {"question": "2+2?", "thinking_trajectories": [], "attempt": "4"}, "raw:1: the thinking is empty, or"),
        ("s1k", {"question": "2+2?", "thinking_trajectories": [" "], "attempt": "4"}, "raw:1: the thinking is empty"),
        ("s1k", {"question": "2+2?", "thinking_trajectories": ["a", "b"], "attempt": "4"}, r"more than one text \(2\)"),
        (
            "messages",
            {"conversations": [{"from": "robot", "value": "4"}]},
            "raw:1: a turn is from 'robot', expected human, gpt",
        ),
        ("alpaca", {"instruction": "Add.", "output": " "}, "raw:1: field 'output' is empty"),
        ("alpaca", {"instruction": "", "output": "4"}, "raw:1: field 'instruction' is empty"),
        ("sharegpt", {"conversations": "Hi"}, "raw:1: field 'conversations' must be a non-empty list"),
        (
            "s1k",
            {"question": "?", "thinking_trajectories": ["a"], "attempt": ""},
            "raw:1: the answer .* is empty",
        ),
        ("messages", {"text": "4"}, "raw:1: field 'messages' is missing"),
        (
            "alpaca",
            {"instruction": "Add.", "input": "2", "context": "3", "output": "4"},
            "'input' and 'context' differ",
        ),
        (
            "s1k",
            {"question": "?", "thinking_trajectories": 3, "attempt": "4"},
            "'thinking_trajectories' must be a list of one text, not int",
        ),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "raw:1: turn 1: field 'value' is missing"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["a"]]}, "field 'history' must be a list of pairs"),
    ],
)
def test_raw_rows_that_are_not_of_the_set(name, raw, message):
    with pytest.raises(ValueError, match=message):
        converted(name, raw)


class TestCommand:
    @pytest.fixture
    def raw(self, tmp_path):
        rows = [{"question": f"{i}+2?", "answer": f"So <<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}"} for i in range(5)]
        path = tmp_path / "raw.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "raw.parquet")
        (tmp_path / "raw.json").write_text(json.dumps(rows))
        return path

    def test_files_of_every_kind(self, raw, tmp_path, capsys):
        out = tmp_path / "out.jsonl"
        main(["gsm8k", str(out), str(raw), str(raw.with_suffix(".parquet")), str(raw.with_suffix(".json"))])
        assert "gsm8k: 15 of 15 rows" in capsys.readouterr().out
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(rows) == 15
        assert rows[0] == rows[5] == rows[10]
        assert rows[1]["answer"] == "<think>\nSo 3.\n</think>\n3"

    def test_nothing_is_written_over_or_half_written(self, raw, tmp_path):
        out = tmp_path / "out.jsonl"
        with raw.open("a") as file:
            file.write('{"question": "a", "answer": "b"}\n')
        with pytest.raises(SystemExit, match=r"raw\.jsonl:6: field 'answer' has no ####.*--on-bad-row skip"):
            main(["gsm8k", str(out), str(raw)])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.json", "raw.jsonl", "raw.parquet"]
        main(["gsm8k", str(out), str(raw), "--on-bad-row", "skip"])
        with pytest.raises(SystemExit, match="exists: delete it"):
            main(["gsm8k", str(out), str(raw)])
        assert len(out.read_text().splitlines()) == 5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["alpaca", "OUT"], "alpaca is a kind of file: name the files"),
            (["countdown", "OUT", "--rows", "0"], "--rows 0: must be at least 1"),
            (["gsm8k", "OUT", "nowhere.jsonl"], r"nowhere\.jsonl: no such file or folder"),
            (["gsm8k", "OUT.parquet", "raw.jsonl"], r"the output is a \.jsonl file"),
            (["gsm8k", "OUT"], "openai/gsm8k/main: no such file or folder in .*the hub does not give"),
        ],
        ids=str,
    )
    def test_errors(self, raw, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        arguments = [argument.replace("OUT", "out.jsonl") for argument in arguments]
        with pytest.raises(SystemExit, match=f"(?s)error: .*{message}"):
            main(arguments)
