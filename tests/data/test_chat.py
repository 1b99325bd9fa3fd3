"""A field that means something is used or refused, never ignored."""

import json
import re

import pytest

from data import DataConfig, PlacedRow, rows_of
from data.chat import Columns, to_chat, to_prompt, with_thinking
from data.report import Report, save
from diffllm.tokenizer import CHAT_TEMPLATES, builtin_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ROWS = (
    {"prompt": "2+2?", "response": "4"},
    {"question": "2+2?", "answer": "<think>Two twos.</think>4"},
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
)
QUERY, COLUMNS = {"query": "2+2?", "output": "4", "level": 2}, {"prompt": "query", "response": "output"}


def chat_of(row):
    return to_chat(PlacedRow(row, "rows:1"))


def user(content="2+2?", **fields):
    return {"role": "user", "content": content, **fields}


def assistant(content="4", **fields):
    return {"role": "assistant", "content": content, **fields}


def prepared(tokenizer, *rows, **settings):
    placed = [PlacedRow(each, f"rows:{number}") for number, each in enumerate(rows, start=1)]
    return rows_of({"rows": placed}, DataConfig(**settings), tokenizer)


def decoded(tokenizer, tokens):
    return tokenizer.decode(tokens.ids(0))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: next(iter(row)))
class TestEverySchema:
    @pytest.mark.parametrize("field", ["system", "system_prompt", "system_message"])
    def test_a_system_message_beside_the_others(self, row, field):
        placed = PlacedRow(row | {field: "Be brief."}, "rows:1")
        assert to_chat(placed)["prompt"] == [SYSTEM, user()] == to_prompt(placed)
        for nothing in (None, "", " "):
            assert chat_of(row | {field: nothing})["prompt"] == [user()]
        with pytest.raises(ValueError, match=rf"^rows:1: field '{field}' must be text, not int"):
            chat_of(row | {field: 3})

    @pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
    def test_tools(self, row, tools):
        tokenizer = builtin_tokenizer()
        with pytest.raises(ValueError, match=r"rows:1: .*'tools'.*model\.chat_template"):
            prepared(tokenizer, row | {"tools": tools})
        tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
        assert decoded(tokenizer, prepared(tokenizer, row | {"tools": tools})[0]).startswith(json.dumps(TOOLS))

    @pytest.mark.parametrize("tools", [None, [], "[]", ""])
    def test_no_tools(self, row, tools):
        assert "tools" not in chat_of(row | {"tools": tools})

    @pytest.mark.parametrize("tools", [3, {"name": "add"}, ["add"], '"add"', "add", '{"name": "add"}'])
    def test_tools_that_are_none(self, row, tools):
        with pytest.raises(ValueError, match="rows:1: field 'tools' "):
            chat_of(row | {"tools": tools})

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *((name, ["a"]) for name in ("image", "images", "video", "videos", "audio", "audios")),
            ("image", {"path": "a"}),
            ("tool_calls", [{"name": "a"}]),
            ("functions", "[]"),
            ("documents", ["a"]),
            ("context", "a"),
            ("history", [["a", "b"]]),
            ("chosen", "a"),
            ("rejected", [assistant()]),
            ("label", False),
            ("weight", 0),
            ("weight", 0.0),
            ("image_url", "a.png"),
            ("image_path", "a.png"),
            ("loss_mask", [0, 1]),
            ("sample_weight", 0.5),
            ("rejected_response", "a"),
            ("suffix", "a"),
            ("loss", False),
            ("train", False),
        ],
        ids=str,
    )
    def test_what_would_be_ignored(self, row, field, value):
        with pytest.raises(ValueError, match=f"rows:1: field '{field}' has no effect"):
            chat_of(row | {field: value})
        assert chat_of(row | {field: None}) == chat_of(row)
        to_chat(PlacedRow(row | {field: value}, "rows:1"), used=[field])

    @pytest.mark.parametrize("field", ["weight", "loss", "train"])
    def test_a_row_that_counts(self, row, field):
        assert chat_of(row | {field: 1}) == chat_of(row)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *((field, value) for field in ("weight", "loss", "train") for value in ("false", "no", "0", "", [1])),
            ("train", 0.5),
            ("weight", 0.5),
            ("train", 2),
        ],
        ids=str,
    )
    def test_a_mark_is_a_truth_value(self, row, field, value):
        with pytest.raises(ValueError, match=re.escape(f"rows:1: the row has {field}={value!r}")):
            chat_of(row | {field: value})

    @pytest.mark.parametrize("loss", [0.31, 2, -1.5])
    def test_a_measured_loss_is_listed(self, row, tokenizer, loss):
        assert prepared(tokenizer, row | {"loss": loss})[1].unused == {"loss": 1}

    def test_columns_that_were_not_used_are_listed(self, row, tokenizer, tmp_path):
        row = row | {"id": 3, "notes": None, "source": "made", "level": 2, "url": "x"}
        _, report = prepared(tokenizer, row, row, filter="level > 1")
        assert report.unused == {"id": 2, "url": 2}
        assert "columns that were not used: id, url" in report.text()
        save([report], tmp_path)
        saved = json.loads((tmp_path / "data_report.json").read_text())["training"]
        assert saved["unused"] == {"id": 2, "url": 2}
        assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_prompt_needs_none_of_what_is_of_the_answer():
    assert to_prompt(PlacedRow({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "rows:1")) == [user()]
    with pytest.raises(ValueError, match="rows:1: field 'images'"):
        to_prompt(PlacedRow({"prompt": "2+2?", "images": ["a"]}, "rows:1"))


@pytest.mark.parametrize("row", [{"messages": [SYSTEM, user(), assistant()]}, {"prompt": [SYSTEM, user()]}])
def test_two_system_messages(row):
    answer = {"response": "4"} if "prompt" in row else {}
    assert chat_of(row | answer | {"system": " Be brief."})["prompt"] == [SYSTEM, user()]
    with pytest.raises(ValueError, match=r"rows:1: field 'system_prompt' and the system message .* differ"):
        chat_of(row | answer | {"system_prompt": "Be long."})
    with pytest.raises(ValueError, match="rows:1: fields 'system' and 'system_prompt' differ"):
        chat_of(row | answer | {"system": "Be brief.", "system_prompt": "Be long."})


@pytest.mark.parametrize("content", [None, "", " \n", [], [{"type": "text", "text": ""}]])
def test_an_empty_system_message_is_none(content):
    row = {"messages": [{"role": "system", "content": content}, user(), assistant()]}
    assert chat_of(row) == {"prompt": [user()], "response": "4"}
    assert chat_of({"messages": [*row["messages"], row["messages"][0]]}) == chat_of(row)
    with pytest.raises(ValueError, match="rows:1: the last of 'messages' must be the assistant's"):
        chat_of({"messages": row["messages"][:1]})
    assert chat_of(row | {"system": "Be brief."})["prompt"] == [SYSTEM, user()]


@pytest.mark.parametrize("content", [None, "", [{"type": "text", "text": " "}]])
@pytest.mark.parametrize(
    ("field", "value"), [("tools", TOOLS), ("images", ["x"]), ("tool_calls", [{"name": "a"}]), ("reasoning", "a")]
)
def test_an_empty_system_message_carries_nothing(content, field, value):
    system = {"role": "system", "content": content, field: value}
    with pytest.raises(ValueError, match=f"rows:1: message 1 of 'messages' has {field}"):
        chat_of({"messages": [system, user(), assistant()]})


@pytest.mark.parametrize(
    ("field", "value", "harmless"),
    [
        ("train_on_turn", False, True),
        ("training", False, True),
        ("masked", True, False),
        ("prefix", True, False),
        ("reasoning_details", [{"text": "a"}], []),
    ],
)
def test_fields_of_an_answer_with_a_meaning(field, value, harmless):
    with pytest.raises(ValueError, match=f"rows:1: message 2 of 'messages' has {field}"):
        chat_of({"messages": [user(), assistant(**{field: value})]})
    assert chat_of({"messages": [user(), assistant(**{field: harmless})]})["response"] == "4"


class TestThinking:
    @pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
    @pytest.mark.parametrize("text", ["t", "<think>t</think>", " <think>\nt\n</think>\n"])
    def test_tags_around_it_are_not_written_twice(self, field, text):
        expected = "<think>\nt\n</think>\na"
        assert chat_of({"prompt": "q", "response": "a", field: text})["response"] == expected
        assert chat_of({"prompt": "q", "response": expected, field: text})["response"] == expected
        assert chat_of({"messages": [user(), assistant("a", **{field: text})]})["response"] == expected
        assert with_thinking(text, "a") == expected

    @pytest.mark.parametrize("text", ["<think>t", "t</think>", "<think><think>t</think></think>", "a <think>b</think>"])
    def test_other_tags_in_it(self, text):
        with pytest.raises(ValueError, match=r"rows:1: .*'reasoning'.*<think>"):
            chat_of({"prompt": "q", "response": "a", "reasoning": text})
        with pytest.raises(ValueError, match="<think>"):
            with_thinking(text, "a")

    @pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
    def test_it_comes_before_the_answer(self, field):
        expected = "<think>\nTwo twos.\n</think>\n4"
        messages = [user(), assistant(**{field: " Two twos.\n"}), user("3+3?"), assistant("6", **{field: None})]
        chat = chat_of({"messages": messages})
        assert (chat["prompt"][1]["content"], chat["response"]) == (expected, "6")
        for row in ({"prompt": "2+2?", "response": "4"}, {"question": "2+2?", "answer": "4"}):
            assert chat_of(row | {field: "Two twos."})["response"] == expected
        assert chat_of({"prompt": "?", "completion": [assistant(**{field: "Two twos."})]})["response"] == expected

    @pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
    def test_it_is_the_same_or_refused(self, field):
        answer = "<think>\nTwo twos.</think>4"
        assert chat_of({"messages": [user(), assistant(answer, **{field: "Two twos."})]})["response"] == answer
        with pytest.raises(ValueError, match=rf"rows:1: message 2 of 'messages'.*<think>.*'{field}'"):
            chat_of({"messages": [user(), assistant(answer, **{field: "Four."})]})
        with pytest.raises(ValueError, match=rf"rows:1: field 'response'.*'{field}' must be text, not int"):
            chat_of({"prompt": "?", "response": "4", field: 3})

    def test_where_it_belongs_to_no_answer(self):
        with pytest.raises(ValueError, match="rows:1: message 1 of 'messages' has reasoning"):
            chat_of({"messages": [user(reasoning="a"), assistant()]})
        with pytest.raises(ValueError, match="rows:1: field 'reasoning' has no effect"):
            chat_of(ROWS[2] | {"reasoning": "a"})
        with pytest.raises(ValueError, match=r"rows:1: .*reasoning_content, thinking differ"):
            chat_of({"messages": [user(), assistant(thinking="a", reasoning_content="b")]})


class TestTrainedAnswers:
    def messages(self, *marks):
        turns = [(user(f"{i}?"), assistant(f"{i}", **mark)) for i, mark in enumerate(marks)]
        return {"messages": [message for turn in turns for message in turn]}

    @pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"train": 0}])
    def test_the_last_that_is_trained_on_is_the_response(self, mark):
        row = self.messages({}, {"weight": 1}, mark)
        assert chat_of(row) == {"prompt": [user("0?"), assistant("0"), user("1?")], "response": "1"}
        assert to_prompt(PlacedRow(row, "rows:1")) == chat_of(row)["prompt"]
        with pytest.raises(ValueError, match="rows:1: no answer is trained on"):
            chat_of(self.messages(mark, mark))
        with pytest.raises(ValueError, match="rows:1: no answer is trained on"):
            chat_of({"prompt": "?", "response": [assistant(**mark)]})

    def test_others_are_context(self, tokenizer):
        tokens, _ = prepared(
            tokenizer, self.messages({}, {"weight": 0}, {"loss": True}, {"train": False}), loss_on="all"
        )
        ids = tokens.ids(0)
        learnt = [i >= tokens.prompt_lengths[0] for i in range(len(ids))]
        for start, end in tokens.context(0):
            learnt[start:end] = [False] * (end - start)
        assert tokenizer.decode(ids[learnt]) == "0<|im_end|>2<|endoftext|>"

    @pytest.mark.parametrize("mark", [{"weight": 0.5}, {"loss": "no"}, {"train": 2}, {"weight": [0]}], ids=str)
    def test_other_marks(self, mark):
        [(field, value)] = mark.items()
        with pytest.raises(ValueError, match=re.escape(f"rows:1: message 2 of 'messages' has {field}={value!r}")):
            chat_of(self.messages(mark))
        assert chat_of({"messages": [user(**mark), assistant()]})["response"] == "4"

    def test_marks_of_other_messages_are_listed(self, tokenizer):
        for mark in ({"weight": 0}, {"loss": False}, {"train": None}):
            assert prepared(tokenizer, {"messages": [user(**mark), assistant()]})[1].unused == {}
        for mark in ({"weight": 1}, {"loss": True}, {"train": 0.5}):
            for row in ({"messages": [user(**mark), assistant()]}, {"messages": [SYSTEM | mark, user(), assistant()]}):
                assert prepared(tokenizer, row)[1].unused == {f"messages[].{next(iter(mark))}": 1}

    def test_marks_that_contradict_each_other(self):
        with pytest.raises(ValueError, match="weight=0, train=True contradict"):
            chat_of(self.messages({"weight": 0, "train": True}))


class TestContent:
    def test_parts_of_text_are_joined(self):
        parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
        assert chat_of({"messages": [user(parts), assistant()]})["prompt"] == [user()]

    @pytest.mark.parametrize(
        ("part", "kind"),
        [
            ({"type": "image_url", "image_url": "a"}, "image_url"),
            ({"type": "text", "text": None}, "text"),
            ({"text": "a"}, "None"),
            ("a", "str"),
        ],
        ids=str,
    )
    def test_other_parts(self, part, kind):
        with pytest.raises(ValueError, match=rf"rows:1: message 1 of 'messages' has a part of type '?{kind}"):
            chat_of({"messages": [user([part]), assistant()]})

    def test_further_fields_of_parts(self):
        part = {"type": "text", "text": "2+2?", "cache_control": {"type": "ephemeral"}, "image_url": None}
        assert chat_of({"messages": [user([part]), assistant()]})["prompt"] == [user()]
        with pytest.raises(ValueError, match="rows:1: message 1 of 'messages' has a part with image_url"):
            chat_of({"messages": [user([part | {"image_url": "x"}]), assistant()]})

    @pytest.mark.parametrize("response", ["    return 4\n", "\n\n4", " 4", "\t4 \n"])
    def test_a_response_keeps_its_spaces(self, tokenizer, response):
        for row in ({"prompt": "?", "response": response}, {"messages": [user(), assistant(response)]}):
            assert decoded(tokenizer, prepared(tokenizer, row)[0]).endswith(f"assistant\n{response}<|endoftext|>")
        thought = chat_of({"prompt": "?", "response": "    return 4\n", "reasoning": "a"})["response"]
        assert thought == "<think>\na\n</think>\n    return 4\n"


class TestCompletion:
    @pytest.mark.parametrize("prompt", ["2+2?", [user()]])
    @pytest.mark.parametrize("completion", [" 4", [assistant(" 4")]])
    def test_it_is_the_response(self, prompt, completion):
        row = {"prompt": prompt, "completion": completion}
        assert chat_of(row) == {"prompt": [user()], "response": " 4"}
        assert chat_of(row | {"response": completion})["response"] == " 4"
        with pytest.raises(ValueError, match="rows:1: field 'response' and field 'completion' differ"):
            chat_of(row | {"response": "5"})

    @pytest.mark.parametrize("completion", [" 4", [assistant(" 4")]])
    def test_it_is_trained_on(self, tokenizer, tmp_path, completion):
        expected = decoded(tokenizer, prepared(tokenizer, {"prompt": "2+2?", "response": " 4"})[0])
        row = {"prompt": "2+2?", "completion": completion}
        assert decoded(tokenizer, prepared(tokenizer, row, filter="len(completion) > 0")[0]) == expected
        renamed = {"query": "2+2?", "output": completion}
        columns = {"prompt": "query", "completion": "output"}
        assert decoded(tokenizer, prepared(tokenizer, renamed, columns=columns)[0]) == expected
        held_out = tmp_path / "test.jsonl"
        held_out.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match="no row is left"):
            prepared(tokenizer, row, decontaminate_files=[str(held_out)])

    @pytest.mark.parametrize("completion", [[], [assistant(), user(), assistant()], [user()], 3, "", None])
    def test_other_completions(self, completion):
        with pytest.raises(ValueError, match=r"rows:1: .*'completion'"):
            chat_of({"prompt": "2+2?", "completion": completion})


class TestColumns:
    def test_they_are_read_under_their_names_here(self, tokenizer):
        tokens, report = prepared(tokenizer, QUERY, columns=COLUMNS, filter="len(query) > level")
        assert decoded(tokenizer, tokens) == decoded(tokenizer, prepared(tokenizer, ROWS[0])[0])
        assert report.unused == {}
        swapped = {"question": "<think>a</think>4", "answer": "2+2?"}
        tokens, _ = prepared(tokenizer, swapped, columns={"question": "answer", "answer": "question"})
        assert decoded(tokenizer, tokens).endswith("<think>a</think>4<|endoftext|>")

    def test_a_set_to_keep_away_from(self, tokenizer, tmp_path):
        path = tmp_path / "test.jsonl"
        path.write_text(json.dumps({"query": "2+2?"}) + "\n" + json.dumps({"question": "3+3?"}) + "\n")
        rows = [QUERY, QUERY | {"query": "3+3?"}, QUERY | {"query": "4+4?"}]
        tokens, _ = prepared(tokenizer, *rows, columns=COLUMNS, decontaminate_files=[str(path)])
        assert "4+4?" in decoded(tokenizer, tokens)
        assert len(tokens) == 1
        with pytest.raises(ValueError, match="no row has a column 'query'"):  # none that is trained on
            prepared(tokenizer, ROWS[0], columns={"prompt": "query"}, decontaminate_files=[str(path)])

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"prompt": ""}, r"data\.columns={prompt: ''}"),
            ({"promt": "query"}, r"data\.columns={promt: query}: .*did you mean prompt or"),
            ({"prompt": "query", "response": "query"}, r"data\.columns={'prompt': 'query', 'response': 'query'}"),
            ({"prompt": "qery", "response": "output"}, r"data\.columns={prompt: qery}: no row .*did you mean query\?"),
            ({"prompt": "query", "response": "xyz"}, r"data\.columns={response: xyz}: no row .*level, output, query"),
            ({"prompt": "query", "response": "level"}, r"rows:1: field 'response' must be text, not int"),
        ],
        ids=str,
    )
    def test_what_they_cannot_be(self, tokenizer, columns, message):
        with pytest.raises(ValueError, match=message):
            prepared(tokenizer, QUERY, columns=columns)

    def test_a_name_that_a_row_has_itself(self, tokenizer):
        with pytest.raises(ValueError, match=r"rows:1: data\.columns={prompt: query}.* 'prompt'"):
            prepared(tokenizer, QUERY | {"prompt": "3+3?"}, columns=COLUMNS)
        assert len(prepared(tokenizer, QUERY | {"prompt": None}, columns=COLUMNS)[0]) == 1
        assert len(prepared(tokenizer, ROWS[0], columns={"prompt": "prompt"})[0]) == 1

    def test_an_answer_may_be_missing_where_it_is_sampled(self):
        columns = Columns(COLUMNS)
        assert to_prompt(columns(PlacedRow({"query": "2+2?"}, "rows:1"))) == [user()]
        columns.check(optional=["response"])
        with pytest.raises(ValueError, match="no row has a column 'output'"):
            columns.check()

    @pytest.mark.parametrize(
        ("row", "advice"),
        [
            ({"query": "a", "output": "b"}, "data.columns={prompt: query, response: output}"),
            ({"prompt": "a", "solution": "b"}, "data.columns={response: solution}"),
            (
                {"left": "a", "right": "b"},
                "data.columns={prompt: QUESTION, response: ANSWER}'. Its fields are: left, right",
            ),
            ({"instruction": "a", "context": "b", "response": "c"}, "`python -m data.prepare alpaca`"),
        ],
        ids=str,
    )
    def test_rows_of_other_names_are_told_of_them(self, row, advice):
        with pytest.raises(ValueError, match=rf"^rows:1: field .*{re.escape(advice)}"):
            chat_of(row)


def test_tools_make_rows_different():
    tokenizer = builtin_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}" + CHAT_TEMPLATES["chatml"]
    rows = [ROWS[0] | {"tools": [{"name": name}]} for name in ("add", "subtract", "add")]
    assert len(prepared(tokenizer, *rows, drop_duplicates="exact")[0]) == 2


@pytest.mark.parametrize(
    ("settings", "curated"),
    [
        ({"filter": "len(images) == 1"}, False),
        ({"difficulty": "len(images)", "order": "curriculum"}, False),
        ({"difficulty": "len(images)"}, True),
        ({"filter": "len([images for images in prompt.split()]) > 0"}, True),
    ],
    ids=str,
)
def test_only_formulas_that_read_a_field_exempt_it(tokenizer, settings, curated):
    rows = [PlacedRow(ROWS[0] | {"images": ["x.png"]}, "rows:1")]
    with pytest.raises(ValueError, match="rows:1: field 'images'"):
        rows_of({"rows": rows}, DataConfig(**settings), tokenizer, "rows", curated)
    settings |= {"order": "curriculum"} if "difficulty" in settings else {"filter": "len(images) == 1"}
    assert len(rows_of({"rows": rows}, DataConfig(**settings), tokenizer)[0]) == 1


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": 3, "response": "4"}, "'prompt' must be .*text, not int"),
        ({"prompt": "?", "response": {"a": 1}}, "'response' must be text, not dict"),
        ({"question": ["a"], "answer": "4"}, "'question' must be text, not list"),
        ({"messages": "a"}, "'messages' must be a non-empty list of messages, not str"),
        ({"messages": []}, "'messages' must be a non-empty list of messages, not an empty one"),
    ],
    ids=str,
)
def test_an_error_names_the_type(row, found):
    with pytest.raises(ValueError, match=f"^rows:1: field {found}$"):
        chat_of(row)
