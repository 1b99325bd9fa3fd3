"""Rules keep, drop and report rows."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from data import DataConfig, rows_of_files
from data.encode import encode
from tests.data.rows import MESSAGES, prepared, questions, row, write


class TestThinking:
    def test_it_is_dropped_from_all_answers(self, tokenizer):
        turns = [
            {"role": "user", "content": "one?"},
            {"role": "assistant", "content": "<think>\nlong\n</think>\nyes"},
            {"role": "user", "content": "two?"},
            {"role": "assistant", "content": " no "},
        ]
        tokens, _ = prepared(tokenizer, [{"messages": turns}], thinking="drop", loss_on="all")
        text = tokenizer.decode(tokens.ids(0))
        assert "long" not in text
        assert "yes" in text
        assert " no " in text  # an answer without thinking is as it was
        kept, _ = prepared(tokenizer, [row("one", answer="yes")])
        dropped, report = prepared(tokenizer, [row("one", answer="yes")], thinking="drop")
        assert 0 < len(dropped.ids(0)) < len(kept.ids(0))
        assert (report.kept, tokenizer.decode(dropped.ids(0)).count("think")) == (1, 0)

    def test_counts_in_formulas_are_those_of_the_tokens_that_are_left(self, tokenizer):
        rows = [row("one", thinking="long " * 30)]
        assert len(prepared(tokenizer, rows, thinking="drop", filter="thinking_tokens == 0")[0]) == 1

    def test_an_answer_that_is_thinking_alone_cannot_be_used(self, tokenizer):
        with pytest.raises(ValueError, match=r"rows:1: data\.thinking=drop"):
            prepared(tokenizer, [{"prompt": "one", "response": "<think>\nlong\n</think>\n"}], thinking="drop")


class TestCuration:
    ROWS = (
        row("two plus two", source="math", difficulty=1),
        row("Two  plus TWO", source="math", difficulty=2),
        row("name a river", thinking="long " * 30, source="quiz", difficulty=3),
        row("name a hill", source="quiz", difficulty=4),
    )

    @pytest.mark.parametrize(
        ("expression", "kept"),
        [
            ("source == 'math'", [0, 1]),
            ("source in ['quiz', 'law'] and thinking_tokens < 30", [3]),
            ("not (difficulty >= 2) or len(question) == 11", [0, 3]),
            ("thinking_tokens * 2 > prompt_tokens + answer_tokens", [2]),
        ],
    )
    def test_a_filter_keeps_the_rows_of_which_it_is_true(self, tokenizer, expression, kept):
        tokens, report = prepared(tokenizer, self.ROWS, filter=expression)
        assert questions(tokens, tokenizer) == [self.ROWS[i]["question"] for i in kept]
        [(reason, noted)] = report.dropped.items()
        assert expression in reason
        assert noted.count == 4 - len(kept)

    @pytest.mark.parametrize(
        ("expression", "message"),
        [
            ("source ==", "cannot be read: invalid syntax"),
            ("source = 'math'", "cannot be read: invalid syntax"),
            ("level > 2", r"^data\.filter='level > 2': no row has a field level .*known are answer, answer_tok"),
            ("response_token > 2", "^data.filter.*: no row has a field response_token .*did you mean response_tokens"),
            ("difficulty > 9 and level > 2", "no row has a field level"),
            ("__import__('os').remove('x')", r"no function __import__\b.*\blen$"),
            ("set(question)", r"no function set\b.*\blen$"),
            ("thinking_tokens << 1500", r"^data\.filter=.*: bitwise operators"),
            ("source == 'math' & difficulty > 1", r"^data\.filter=.*: bitwise operators"),
            ("difficulty", "^rows:1: data.filter='difficulty': must be true or false, not 1. Fields of the row: que"),
            ("difficulty < 'a'", r"^rows:1: .*not supported between .*'\. Fields of the row: .*answer_tokens$"),
            ("question.__class__", "^rows:1: "),
            ("9 ** 9 ** 9", "^rows:1: "),
        ],
    )
    def test_a_filter_that_cannot_be(self, tokenizer, expression, message):
        """One line, since no row is at fault."""
        with pytest.raises(ValueError, match=message) as error:
            prepared(tokenizer, self.ROWS, filter=expression, on_bad_row="skip")
        assert "\n" not in str(error.value)

    def test_rows_without_a_field_that_others_have_are_bad(self, tokenizer):
        rows = [row(), *self.ROWS]
        with pytest.raises(ValueError, match=r"^rows:1: .*no field source\. .*data\.on_bad_row=skip leaves"):
            prepared(tokenizer, rows, filter="source == 'math'")
        _, report = prepared(tokenizer, rows, filter="source == 'math'", on_bad_row="skip")
        assert (report.kept, report.dropped["cannot be used"].count) == (2, 1)

    def test_every_setting_is_in_the_report_in_its_order(self, tokenizer, tmp_path):
        held_out = write(tmp_path / "a.jsonl", {"question": "Why?"})
        settings = {"filter": "True", "drop_duplicates": "exact", "decontaminate_files": [held_out]}
        _, report = prepared(tokenizer, [row()], **settings, truncation="drop")
        assert report.text().splitlines()[1:5] == [
            "  0 left out by data.filter=True",
            "  0 longer than data.max_length=2048",
            "  0 overlap in 8 words with data.decontaminate_files",
            "  0 duplicates, data.drop_duplicates=exact",
        ]

    def test_three_examples_are_shown_of_each_reason(self, tokenizer):
        _, report = prepared(tokenizer, [row()] * 9, drop_duplicates="exact")
        assert report.text().splitlines()[1:6] == [
            "  8 (88.9%) duplicates, data.drop_duplicates=exact",
            *(f"    rows:{number} 'Hi' (as rows:1)" for number in (2, 3, 4)),
            "    and 5 more",
        ]

    def test_an_example_of_a_chat_is_what_was_asked_first(self, tokenizer):
        [system, *turns] = MESSAGES
        _, report = prepared(tokenizer, [{"messages": [system, *turns]}] * 2, drop_duplicates="exact")
        assert report.dropped["duplicates, data.drop_duplicates=exact"].examples == ["rows:2 '2+2?' (as rows:1)"]

    def test_the_first_of_duplicates_stays(self, tokenizer):
        tokens, report = prepared(tokenizer, self.ROWS, drop_duplicates="exact")
        assert questions(tokens, tokenizer) == ["two plus two", "name a river", "name a hill"]
        assert report.dropped["duplicates, data.drop_duplicates=exact"].examples == [
            "rows:2 'Two plus TWO' (as rows:1)"
        ]

    def test_a_duplicate_of_a_row_that_was_left_out_is_none(self, tokenizer):
        tokens, _ = prepared(tokenizer, self.ROWS, drop_duplicates="exact", filter="difficulty > 1")
        assert questions(tokens, tokenizer)[0] == "Two  plus TWO"

    def test_signs_and_marks_make_rows_different(self, tokenizer):
        rows = [row("Solve x+5=0"), row("Solve x-5=0"), row("क कि"), row("क कु")]
        assert len(prepared(tokenizer, rows, drop_duplicates="exact")[0]) == 4

    def test_a_filtered_row_needs_no_difficulty_and_a_bad_row_has_no_duplicate(self, tokenizer):
        rows = [row("a", source="k", difficulty=1), row("b", source="x"), row("c", source="k"), row("c", difficulty=2)]
        tokens, _ = prepared(tokenizer, rows[:2], filter="source == 'k'", order="curriculum")
        assert len(tokens) == 1
        tokens, _ = prepared(tokenizer, rows, on_bad_row="skip", order="curriculum", drop_duplicates="exact")
        assert questions(tokens, tokenizer) == ["a", "c"]

    def test_near_duplicates_differ_in_more_than_a_sign(self, tokenizer):
        rows = [row("Solve x+5=0", "0-5=-5", "-5"), row("Solve x-5=0", "0+5=5", "5")]
        assert len(prepared(tokenizer, rows, drop_duplicates="near")[0]) == 2

    def test_what_the_system_says_makes_rows_different(self, tokenizer):
        french, german = (
            {"prompt": [{"role": "system", "content": f"In {language}."}, {"role": "user", "content": "No?"}]}
            for language in ("French", "German")
        )
        rows = [each | {"response": "Non, nein."} for each in (french, german, french)]
        assert len(prepared(tokenizer, rows, drop_duplicates="exact")[0]) == 2

    def test_a_short_question_overlaps_where_it_is_all_that_is_asked(self, tokenizer, tmp_path):
        held_out = write(tmp_path / "a.jsonl", {"question": "Why?"})
        tokens, _ = prepared(tokenizer, [row("Why is it so?"), row("why")], decontaminate_files=[held_out])
        assert questions(tokens, tokenizer) == ["Why is it so?"]

    def test_all_bad_rows_of_an_evaluation_set_are_named(self, tokenizer, tmp_path):
        held_out = write(tmp_path / "a.jsonl", {"question": "a"}, {"question": 3}, {"text": "b"})
        with pytest.raises(ValueError, match=r"2 rows cannot be used:\n.*a\.jsonl:2: .*\n.*a\.jsonl:3: "):
            prepared(tokenizer, [row()], decontaminate_files=[held_out])

    def test_what_an_evaluation_set_shares_with_everyone_is_no_overlap(self, tokenizer, tmp_path):
        system = {"role": "system", "content": "You are a helpful assistant who thinks before it answers."}
        held_out = write(
            tmp_path / "a.jsonl", *[{"prompt": [system, {"role": "user", "content": q}]} for q in ("???", "x")]
        )
        rows = [{"prompt": [system, {"role": "user", "content": "Name a tree"}], "response": "oak"}]
        tokens, _ = prepared(tokenizer, rows, decontaminate_files=[held_out])
        assert len(tokens) == 1

    def test_similar_ones_below_the_bound_stay(self, tokenizer):
        words = [f"w{i}" for i in range(200)]
        changed = [*words[:150], *(f"v{i}" for i in range(50))]  # similarity about 0.58
        rows = [row(" ".join(words)), row(" ".join(changed))]
        assert len(prepared(tokenizer, rows, drop_duplicates="near", near_duplicate=0.75)[0]) == 2
        assert len(prepared(tokenizer, rows, drop_duplicates="near", near_duplicate=0.4)[0]) == 1

    def test_near_duplicates(self, tokenizer):
        text = " ".join(f"word{i}" for i in range(60))
        rows = [row(text), row(text.replace("word40", "other")), row(" ".join(reversed(text.split())))]
        assert len(prepared(tokenizer, rows, drop_duplicates="exact")[0]) == 3
        tokens, report = prepared(tokenizer, rows, drop_duplicates="near")
        assert len(tokens) == 2
        assert "(as rows:1)" in report.dropped["duplicates, data.drop_duplicates=near"].examples[0]

    def test_rows_that_overlap_with_an_evaluation_set(self, tokenizer, tmp_path):
        held_out = write(tmp_path / "test.jsonl", {"question": "How far is it from here to the old mill, in miles?"})
        rows = [row("Say how far is it from HERE to the old mill!"), row("How far is it to the old mill?")]
        tokens, report = prepared(tokenizer, rows, decontaminate_files=[held_out])
        assert len(tokens) == 1
        [(reason, noted)] = report.dropped.items()
        assert reason == "overlap in 8 words with data.decontaminate_files"
        assert noted.examples == [f"rows:1 'Say how far is it from HERE to the old mill!' ({held_out}:1)"]

    def test_the_difficulty_of_a_curriculum_is_a_number(self, tokenizer):
        tokens, _ = prepared(tokenizer, self.ROWS, order="curriculum", difficulty="-response_tokens")
        assert tokens.column("difficulty").tolist() == [-float(length) for length in tokens.response_lengths]
        with pytest.raises(ValueError, match=r"rows:1: data\.difficulty='source': must be a finite number, not 'math'"):
            prepared(tokenizer, self.ROWS, order="curriculum", difficulty="source")

    @pytest.mark.parametrize("difficulty", [float("nan"), 10**400])
    def test_a_difficulty_without_a_place_in_the_order(self, tokenizer, difficulty):
        rows = [row("a", difficulty=1), row("b", difficulty=difficulty)]
        with pytest.raises(ValueError, match=r"rows:2: data\.difficulty='difficulty': "):
            prepared(tokenizer, rows, order="curriculum")

    def test_chinese_goes_by_its_characters(self, tokenizer, tmp_path):
        held_out = write(tmp_path / "a.jsonl", {"question": "小明有三个苹果，他吃了一个，还剩几个？"})
        rows = [row("请回答：小明有三个苹果，他吃了一个，还剩几个？"), row("小红有三个梨")]
        assert len(prepared(tokenizer, rows, decontaminate_files=[held_out])[0]) == 1


def test_a_split_of_a_folder_of_chats(tokenizer, tmp_path):
    """As sets of the hub that data/README.md names, such as SmolTalk, hold them."""
    messages = [{"content": each["content"], "role": each["role"]} for each in MESSAGES[1:]]
    for split in ("train", "test"):
        rows = pa.table({"full_topic": ["Sums"], "messages": [messages], "source": [split]})
        pyarrow.parquet.write_table(rows, tmp_path / f"{split}-00000-of-00001.parquet")
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    tokens, report = rows_of_files([f"{tmp_path}:test"], config, tokenizer, "training", True)
    assert tokenizer.decode(tokens.ids(0)).endswith("3+3?<|im_end|>\n<|im_start|>assistant\n6<|endoftext|>")
    assert report.unused == {"full_topic": 1}


class TestMemory:
    def test_texts_are_tokenized_a_few_at_a_time(self, tokenizer, monkeypatch):
        sizes = []

        def watched(chats, *others):
            sizes.append([len(chat["response"]) for chat in chats])
            return encode(chats, *others)

        monkeypatch.setattr("data.preparation.encode", watched)
        rows = [row(answer="x" * 100_000)] * 7 + [row()] * 2500
        assert len(prepared(tokenizer, rows, max_length=200_000)[0]) == len(rows)
        assert list(map(len, sizes)) == [3, 3, 1000, 1000, 501]


class TestBadRows:
    def test_ten_are_named_and_the_others_counted(self, tokenizer, tmp_path):
        file = write(tmp_path / "a.jsonl", *[{"question": "x"}] * 13, row())
        with pytest.raises(
            ValueError, match=r"(?s)^13 rows cannot be used:\n.*a\.jsonl:10: field 'answer'.*\nand 3 more\ndata.on_bad"
        ) as error:
            rows_of_files([file], DataConfig(cache_dir=str(tmp_path)), tokenizer, "training", True)
        assert str(error.value).count("field 'answer' is missing") == 10

    def test_skipped_ones_are_in_the_report(self, tokenizer, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(
            json.dumps(row()).encode() + b'\n{"question": "\xff"}\n{"question": "a", "question": "b"}\n[]\n'
            b'{"prompt": "a", "response": "b"}\n' + json.dumps(row("a", images=["b"])).encode() + b"\n"
        )
        config = DataConfig(cache_dir=str(tmp_path / "cache"), on_bad_row="skip")
        for _ in range(2):  # made, and read again
            tokens, report = rows_of_files([str(tmp_path / "a.jsonl")], config, tokenizer, "training", True)
            assert (len(tokens), report.read) == (1, 6)
            noted = report.dropped["cannot be used"]
            assert noted.count == 5
            for line, problem in ((2, "utf-8"), (3, "question given twice"), (4, "list"), (5, "a row with 'prompt'")):
                assert any(f"a.jsonl:{line}: " in named and problem in named for named in noted.examples)
            assert report.text().splitlines()[1] == "  5 (83.3%) cannot be used"

    def test_a_row_that_is_none_says_nothing_of_the_others(self, tokenizer):
        rows = [{"text": "a"}, {"question": "a"}, {"prompt": "a", "response": "b"}, row()]
        _, report = prepared(tokenizer, rows, on_bad_row="skip")
        assert report.kept == 1
        assert report.dropped["cannot be used"].examples[2].startswith("rows:4: a row with 'question' among rows with")

    def test_rows_of_several_schemas_belong_into_several_files(self, tokenizer):
        rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "response": "b"}, row(), {"text": "a"}]
        advice = "^rows:3: a row with 'question' among rows with 'prompt': put .* into a file of their own$"
        with pytest.raises(ValueError, match=advice):
            prepared(tokenizer, rows)

    def test_a_row_of_no_schema_is_no_other_schema(self, tokenizer):
        with pytest.raises(ValueError, match=r"^rows:2: field 'question' is missing"):
            prepared(tokenizer, [{"prompt": "a", "response": "b"}, {"text": "a"}])

    def test_skipping_none_is_said(self, tokenizer):
        assert prepared(tokenizer, [row()], on_bad_row="skip")[1].text().splitlines()[1] == "  0 cannot be used"

    def test_a_line_without_end(self, tokenizer, tmp_path):
        with (tmp_path / "a.jsonl").open("w") as file:
            file.write(json.dumps(row()) + "\n" + "x" * 100_000_000 + "\n" + json.dumps(row("again")) + "\n")
        config = DataConfig(cache_dir=str(tmp_path / "cache"), on_bad_row="skip")
        tokens, report = rows_of_files([str(tmp_path / "a.jsonl")], config, tokenizer, "training", True)
        assert len(tokens) == 2
        assert "a.jsonl:2: the line is longer than 16,777,216 bytes" in report.dropped["cannot be used"].examples[0]
