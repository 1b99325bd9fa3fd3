"""From files to rows ready to be trained on: what is kept, what is left out and said to be, what is kept on disk."""

import json
import multiprocessing
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data import DataConfig, PlacedRow, rows_of, rows_of_files, turn_end
from data.encode import encode
from data.report import PERCENTILES, Report, save
from diffllm.tokenizer import CHAT_TEMPLATES, builtin_tokenizer


def row(question="Hi", thinking="a", answer="b", **fields):
    return {"question": question, "answer": f"<think>{thinking}</think>{answer}", **fields}


def write(path, *rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def prepared(tokenizer, rows, **settings):
    placed = [PlacedRow(each, f"rows:{number}") for number, each in enumerate(rows, start=1)]
    return rows_of({"rows": placed}, DataConfig(**settings), tokenizer)


def questions(tokens, tokenizer):
    return [
        tokenizer.decode(tokens.ids(i)[: tokens.prompt_lengths[i]]).split("user\n")[1].split("<|im_end|>")[0]
        for i in range(len(tokens))
    ]


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
            ("__import__('os').remove('x')", r"no function __import__, there is len$"),
            ("set(question)", r"no function set, there is len$"),
            ("thinking_tokens << 1500", "has & | ^ ~ << or >>, of bits"),
            ("source == 'math' & difficulty > 1", "has & | ^ ~ << or >>, of bits"),
            ("difficulty", "^rows:1: data.filter='difficulty': must be true or false, it is 1. Fields of the row: que"),
            ("difficulty < 'a'", r"^rows:1: .*not supported between .*'\. Fields of the row: .*answer_tokens$"),
            ("question.__class__", "^rows:1: "),
            ("9 ** 9 ** 9", "^rows:1: "),
        ],
    )
    def test_a_filter_that_cannot_be(self, tokenizer, expression, message):
        """It is said once, as no row is at fault."""
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
        [system, *turns] = TestSeveralTurns.MESSAGES
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
        with pytest.raises(
            ValueError, match=r"rows:1: data\.difficulty='source': must be a finite number, it is 'math'"
        ):
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


class TestSeveralTurns:
    MESSAGES = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "content": "6"},
    )
    # as some checkpoints have it: the next answer is begun whether or not that is asked for
    UNASKED = CHAT_TEMPLATES["llama3"].replace("{% if add_generation_prompt %}", "{{ '").replace("{% endif %}", "' }}")

    @pytest.fixture(params=["chatml", "llama3", "llada", "unasked"])
    def templated(self, request):
        tokenizer = builtin_tokenizer()
        marks = ["<|startoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer.add_special_tokens({"extra_special_tokens": [*marks, "<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = CHAT_TEMPLATES.get(request.param, self.UNASKED)
        return tokenizer

    def trained(self, tokenizer, loss_on):
        tokens, _ = prepared(tokenizer, [{"messages": list(self.MESSAGES)}], loss_on=loss_on)
        ids = tokens.ids(0).tolist()
        learnt = [i >= tokens.prompt_lengths[0] for i in range(len(ids))]
        for start, end in tokens.context(0):
            learnt[start:end] = [False] * (end - start)
        return ids, learnt

    def test_all_answers(self, templated):
        ids, learnt = self.trained(templated, "all")
        whole = templated.apply_chat_template(list(self.MESSAGES[:-1]), add_generation_prompt=True, tokenize=False)
        assert ids == [*templated(whole + "6")["input_ids"], templated.eos_token_id]
        end = "<|im_end|>" if "<|im_start|>" in whole else "<|eot_id|>"
        assert templated.convert_ids_to_tokens([i for i, yes in zip(ids, learnt, strict=True) if yes]) == [
            "4",
            end,
            "6",
            "<|endoftext|>",
        ]
        assert turn_end(templated) == templated.convert_tokens_to_ids(end)

    def test_the_last_answer(self, templated):
        ids, learnt = self.trained(templated, "last")
        assert ids == self.trained(templated, "all")[0]
        assert learnt == [False] * (len(ids) - 2) + [True] * 2

    def test_a_template_that_rewrites_earlier_answers(self, tokenizer):
        hiding = builtin_tokenizer()
        hiding.chat_template = (
            "{% for m in messages %}{{ m['role'] }}:{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}"
            "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
        )
        with pytest.raises(ValueError, match=r"rows:1: the chat template rewrites message 3.*data\.loss_on=last"):
            self.trained(hiding, "all")
        assert any(self.trained(hiding, "last")[1])

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ messages[0]['content'] }}>", "leaves out or rewrites message 2"),
            ("{{ messages[1]['content'] + 1 }}", "refuses messages of system, user"),
            ("{{ messages | map(attribute='content') | join }}<think>\n", "writes <think> before the answer"),
        ],
    )
    def test_a_template_that_loses_or_doubles_text(self, template, message):
        tokenizer = builtin_tokenizer()
        tokenizer.chat_template = template
        rows = [{"messages": [*self.MESSAGES[:2], {"role": "assistant", "content": "<think>a</think>b"}]}]
        with pytest.raises(ValueError, match=f"rows:1: .*the chat template {message}|rows:1: the chat .*{message}"):
            prepared(tokenizer, rows)

    @pytest.mark.parametrize(
        "template",
        [
            None,
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
            "{{ messages[0]['content'] }}<|im_end|>",
            "{{ raise_exception('too many') if messages[1:] else messages[0]['content'] }}",
        ],
    )
    def test_a_template_that_ends_no_answer_with_a_token(self, template):
        tokenizer = builtin_tokenizer()
        tokenizer.chat_template = template
        assert turn_end(tokenizer) is None

    def test_a_template_that_writes_the_date(self):
        dated = builtin_tokenizer()
        dated.chat_template = "{{ strftime_now('%d %b %Y, %H:%M') }} {{ messages[0]['content'] }}:"
        tokens, _ = prepared(dated, [row()])
        assert dated.decode(tokens.ids(0)).startswith("01 Jan 2026, 00:00 Hi:")

    def test_no_template(self):
        tokenizer = builtin_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(ValueError, match=r"^tokenizer .* has no chat template: name one by model\.chat_template$"):
            prepared(tokenizer, [row()] * 3)

    def test_a_tokenizer_that_begins_each_text_with_a_space(self):
        metaspace = Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2, ":": 3, "<eos>": 4}, merges=[]))
        metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=metaspace, eos_token="<eos>", chat_template="{{ messages[0]['content'] }}:"
        )
        assert len(prepared(tokenizer, [{"prompt": "a", "response": "b"}])[0]) == 1
        with pytest.raises(ValueError, match=r"data\.loss_on=all: this tokenizer begins each text with a space"):
            prepared(tokenizer, [{"prompt": "a", "response": "b"}], loss_on="all")

    @pytest.mark.parametrize(
        ("roles", "message"),
        [
            (["user", "user", "assistant"], "message 2 of 'messages' has role 'user', expected 'assistant'"),
            (["assistant"], "message 1 .* expected 'user'"),
            (["user", "system", "assistant"], "message 2 .* has role 'system'"),
            (["user", "assistant", "user"], "the last of 'messages' must be the assistant's, it is the user's"),
            ([], "must be a non-empty list"),
        ],
        ids=str,
    )
    def test_roles_out_of_order(self, tokenizer, roles, message):
        with pytest.raises(ValueError, match=f"rows:1: .*{message}"):
            prepared(tokenizer, [{"messages": [{"role": role, "content": "x"} for role in roles]}])


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

    def test_skipping_none_is_said(self, tokenizer):
        assert prepared(tokenizer, [row()], on_bad_row="skip")[1].text().splitlines()[1] == "  0 cannot be used"

    def test_a_line_without_end(self, tokenizer, tmp_path):
        with (tmp_path / "a.jsonl").open("w") as file:
            file.write(json.dumps(row()) + "\n" + "x" * 100_000_000 + "\n" + json.dumps(row("again")) + "\n")
        config = DataConfig(cache_dir=str(tmp_path / "cache"), on_bad_row="skip")
        tokens, report = rows_of_files([str(tmp_path / "a.jsonl")], config, tokenizer, "training", True)
        assert len(tokens) == 2
        assert "a.jsonl:2: the line is longer than 16,777,216 bytes" in report.dropped["cannot be used"].examples[0]


class TestCache:
    @pytest.fixture
    def files(self, tmp_path):
        return [write(tmp_path / "a.jsonl", row("one"), row("two")), write(tmp_path / "b.jsonl", row("three"))]

    @pytest.fixture
    def load(self, files, tmp_path, tokenizer):
        def load(**settings):
            config = DataConfig(cache_dir=str(tmp_path / "cache"), **settings)
            return rows_of_files(files, config, tokenizer, "training", True)

        return load

    def entries(self, tmp_path):
        return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir())

    def test_rows_are_the_same_from_memory_and_from_disk(self, load, files, tokenizer):
        rows = [row("one"), row("two"), row("three")]
        expected, _ = prepared(tokenizer, rows)
        for _ in range(2):
            tokens, report = load()
            assert [tokens.ids(i).tolist() for i in range(3)] == [expected.ids(i).tolist() for i in range(3)]
            assert tokens.column("source").tolist() == [0, 0, 1]
            assert [tokens.place(i) for i in range(3)] == [f"{files[0]}:1", f"{files[0]}:2", f"{files[1]}:1"]
            assert (report.read, report.kept, list(report.sources.values())) == (3, 3, [2, 1])

    def test_the_second_time_nothing_is_tokenized(self, load, tmp_path, monkeypatch):
        first = load()[0].fingerprint()
        monkeypatch.setattr("data.preparation.encode", None)
        assert load()[0].fingerprint() == first

    def test_anything_that_changes_the_rows_makes_new_ones(self, load, files, tmp_path, tokenizer, monkeypatch):
        load()
        for settings in ({"max_length": 99}, {"loss_on": "all"}, {"filter": "prompt_tokens > 1"}):
            before = self.entries(tmp_path)
            load(**settings)
            assert len(self.entries(tmp_path)) == len(before) + 1
        load(subset=0.5, train_batch_size=2)  # what does not concern tokens
        assert len(self.entries(tmp_path)) == 4
        write(Path(files[1]), row("four"))
        assert questions(load()[0], tokenizer) == ["one", "two", "four"]
        monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + " ")
        load()
        assert len(self.entries(tmp_path)) == 6

    def test_other_columns_make_other_rows(self, tmp_path, tokenizer):
        file = write(tmp_path / "a.jsonl", {"first": "one", "second": "two"})
        made = []
        for columns in ({"prompt": "first", "response": "second"}, {"prompt": "second", "response": "first"}):
            config = DataConfig(cache_dir=str(tmp_path / "cache"), columns=columns)
            made += questions(rows_of_files([file], config, tokenizer, "training", True)[0], tokenizer)
        assert made == ["one", "two"]

    def test_validation_rows_are_not_made_anew_by_what_is_not_theirs(self, files, tmp_path, tokenizer):
        for settings in ({}, {"filter": "False", "order": "curriculum", "drop_duplicates": "exact"}):
            config = DataConfig(cache_dir=str(tmp_path / "cache"), **settings)
            rows_of_files(files, config, tokenizer, "validation", curated=False)
        assert len(self.entries(tmp_path)) == 1

    def test_the_order_of_the_files_is_part_of_the_rows(self, load, files, tmp_path, tokenizer):
        assert load()[0].column("source").tolist() == [0, 0, 1]
        files.reverse()
        assert load()[0].column("source").tolist() == [0, 1, 1]

    def test_a_file_is_given_once(self, load, files):
        with pytest.raises(ValueError, match=r"data\.train_files: .*a\.jsonl given twice"):
            DataConfig(train_files=[files[0], files[0]])

    def test_other_users_can_read_it_and_wait_for_it(self, load, tmp_path):
        load()
        [entry] = self.entries(tmp_path)
        assert (tmp_path / "cache" / entry).stat().st_mode & 0o555 == 0o555
        assert (tmp_path / "cache" / f"{entry}.lock").stat().st_mode & 0o666 == 0o666

    def test_what_a_killed_process_left_is_cleared(self, load, tmp_path):
        first = load()[0].fingerprint()
        [entry] = self.entries(tmp_path)
        (tmp_path / "cache" / entry).rename(tmp_path / "cache" / f"{entry}.unfinished")
        (tmp_path / "cache" / f"{entry}.unfinished" / "rows.arrow").write_bytes(b"half")
        assert load()[0].fingerprint() == first
        assert self.entries(tmp_path) == [entry]

    def test_a_broken_entry_is_named(self, load, tmp_path):
        load()
        [entry] = self.entries(tmp_path)
        rows = tmp_path / "cache" / entry / "rows.arrow"
        rows.write_bytes(rows.read_bytes()[:100])
        with pytest.raises(ValueError, match=rf"{entry}: these tokenized rows cannot be read .*; delete the directory"):
            load()

    def test_an_entry_that_ends_between_two_batches(self, load, files, tmp_path):
        write(Path(files[0]), *[row()] * 1000)
        load()
        [entry] = self.entries(tmp_path)
        rows = tmp_path / "cache" / entry / "rows.arrow"
        with pa.ipc.open_stream(rows.read_bytes()) as read:
            first, schema = read.read_next_batch(), read.schema
        with pa.ipc.new_stream(str(rows), schema) as written:
            written.write(first)
        with pytest.raises(ValueError, match=rf"{entry}: .*it has 1000 of 1001 rows.*; delete the directory"):
            load()

    def test_files_that_change_while_they_are_read(self, load, files, tmp_path, monkeypatch):
        def changed(chats, *others):
            write(Path(files[1]), row("four"))
            return encode(chats, *others)

        with monkeypatch.context() as patch:
            patch.setattr("data.preparation.encode", changed)
            with pytest.raises(ValueError, match="changed while they were read"):
                load()
        assert self.entries(tmp_path) == []

    def test_nothing_half_built_is_ever_used(self, load, files, tmp_path, tokenizer, monkeypatch):
        def interrupted(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("os.rename", interrupted)
            with pytest.raises(KeyboardInterrupt):
                load()
        assert self.entries(tmp_path) == []
        assert len(load()[0]) == 3

    @pytest.mark.parametrize("name", ["rows.arrow", "report.json"])
    def test_a_flipped_byte_is_noticed(self, load, files, tmp_path, name):
        load()
        [file] = (tmp_path / "cache").glob(f"*/{name}")
        content = file.read_bytes()
        for place in range(0, len(content), 97):
            file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            if name == "rows.arrow":
                with pytest.raises(ValueError, match=f"{file.parent}: these tokenized rows cannot be read"):
                    load()
            else:
                with suppress(ValueError):  # of a number it is another number
                    load()

    @pytest.mark.parametrize("report", ["null", "[1]", "{}", '{"digest": 1, "report": {}}', '{"report": {"kept": 3}}'])
    def test_a_broken_report_is_named(self, load, files, tmp_path, report):
        load()
        [file] = (tmp_path / "cache").glob("*/report.json")
        file.write_text(report)
        with pytest.raises(ValueError, match=f"{file.parent}: these tokenized rows cannot be read"):
            load()

    def test_several_processes_make_it_once(self, load, files, tmp_path):
        context = multiprocessing.get_context("fork")
        config = DataConfig(cache_dir=str(tmp_path / "cache"))
        with context.Pool(3) as pool:
            prints = pool.starmap(_fingerprint, [(files, config, str(tmp_path / "builds"))] * 3)
        assert len(set(prints)) == 1
        assert len((tmp_path / "builds").read_text().split()) == 1


def _fingerprint(files, config, builds):
    import data.token_cache

    build = data.token_cache._build

    def counted(*args):
        with open(builds, "a") as log:
            log.write(f"{os.getpid()}\n")
        build(*args)

    data.token_cache._build = counted
    return rows_of_files(files, config, builtin_tokenizer(), "training", True)[0].fingerprint()


def test_the_report_as_text_json_and_picture(tokenizer, tmp_path, monkeypatch):
    monkeypatch.undo()
    rows = [row(f"question {i}", thinking="a " * i, source=i % 3) for i in range(1, 41)]
    kept = "source > 0 or '$^$' in question"  # no formula to be drawn
    tokens, report = prepared(tokenizer, rows, filter=kept, max_length=80, truncation="right")
    text = report.text()
    assert text.startswith("training: 27 of 40 rows\n")
    assert "13 (32.5%) left out by data.filter=source > 0 or '$^$' in question" in text
    assert f"{report.cut.count} ({report.cut.count / 40:.1%}) responses cut, {report.answerless} of them" in text
    lengths = {
        "prompt": tokens.prompt_lengths,
        "response": tokens.response_lengths,
        "thinking": tokens.column("thinking_tokens"),
        "answer": tokens.column("answer_tokens"),
    }
    for part, values in lengths.items():
        expected = np.percentile(values, PERCENTILES, method="higher").tolist()
        assert list(report.tokens()[part].values()) == expected
    assert "rows:3 'question 3'" in text
    files = save([report], tmp_path)
    saved = json.loads(files[0].read_text())["training"]
    assert saved["tokens"] == report.tokens()
    assert (saved["kept"], saved["dropped"][f"left out by data.filter={kept}"]["count"]) == (27, 13)
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_subset_has_an_account_of_its_own(tokenizer):
    rows = [row(f"question {i}", thinking="a " * 50 * (i % 2)) for i in range(10)]
    tokens, report = prepared(tokenizer, rows, max_length=80, truncation="right")
    assert (report.cut.count, report.answerless) == (5, 5)
    kept = report.keep_only(tokens, np.array([0, 2, 3, 4]), "not in data.subset=4")
    assert (len(kept), report.kept, report.cut.count, report.cut.examples) == (4, 4, 1, ["rows:4"])
    assert report.dropped["not in data.subset=4"].examples == ["rows:2", "rows:6", "rows:7"]
    assert report.text().splitlines()[1:8] == [
        "  6 (60.0%) not in data.subset=4",
        "    rows:2",
        "    rows:6",
        "    rows:7",
        "    and 3 more",
        "  1 (10.0%) responses cut, 1 of them before the answer",
        "    rows:4",
    ]
