"""Chats to tokens, cut or refused where they do not fit."""

import numpy as np
import pytest

from data import DataConfig, PlacedRow, rows_of


def placed(question="Hi", answer="<think>a</think>b"):
    return PlacedRow({"question": question, "answer": answer}, "rows.jsonl:1")


def tokenize(rows, tokenizer, max_length, truncation="error"):
    return rows_of({"rows": rows}, DataConfig(max_length=max_length, truncation=truncation), tokenizer)


def test_a_row_is_the_template_and_the_response_and_its_end(tokenizer):
    rows, _ = tokenize([placed()], tokenizer, 100)
    prompt, response = np.split(rows.ids(0), rows.prompt_lengths)
    assert tokenizer.decode(prompt) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(response) == "<think>a</think>b<|endoftext|>"
    assert rows.response_lengths.tolist() == [len(response)]
    assert (rows.place(0), rows.context(0).tolist()) == ("rows.jsonl:1", [])
    assert (rows.column("thinking_tokens"), rows.column("answer_tokens")) == ([1], [1])


def test_truncation(tokenizer):
    whole, _ = tokenize([placed()], tokenizer, 100)
    length = len(whole.ids(0))
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*data\.max_length={length - 1}.*drop or right"):
        tokenize([placed()], tokenizer, length - 1)
    cut, report = tokenize([placed()], tokenizer, length - 1, "right")
    assert cut.ids(0).tolist() == whole.ids(0)[:-1].tolist()
    assert (report.dropped, report.cut.count, report.answerless) == ({}, 1, 0)
    for lost, left in ((2, (1, 0)), (3, (1, 0)), (4, (0, 0))):  # end, b, </think>, a
        cut, report = tokenize([placed()], tokenizer, length - lost, "right")
        assert (*cut.column("thinking_tokens"), *cut.column("answer_tokens")) == left
        assert report.answerless == 1
    short = placed(answer="<think></think>b")
    kept, report = tokenize([placed(), short], tokenizer, length - 1, "drop")
    assert (len(kept), report.read, report.kept, report.cut) == (1, 2, 1, None)
    assert [noted.count for noted in report.dropped.values()] == [1]


def test_thinking_ends_where_it_ends_last(tokenizer):
    """As `final_answer` has it."""
    rows, _ = tokenize([placed(answer="<think>I write </think> here.</think>b")], tokenizer, 100)
    assert (*rows.column("thinking_tokens"), *rows.column("answer_tokens")) == (len("I write ") + 1 + len(" here."), 1)
    begun = PlacedRow({"prompt": "a", "response": "so</think>b"}, "rows.jsonl:1")  # where the template begins it
    rows, _ = tokenize([begun], tokenizer, 100)
    assert (*rows.column("thinking_tokens"), *rows.column("answer_tokens")) == (2, 1)


def test_a_prompt_that_leaves_no_room_cannot_be_cut(tokenizer):
    rows = [placed("x" * 50), placed("x")]
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: data\.max_length=20 cuts the prompt of \d+ tokens"):
        tokenize(rows, tokenizer, 20, "right")
    settings = {"max_length": 20, "truncation": "right"}
    kept, report = rows_of({"rows": rows}, DataConfig(**settings, on_bad_row="skip"), tokenizer)
    assert (len(kept), report.dropped["cannot be used"].count) == (1, 1)
    kept, _ = rows_of({"rows": rows}, DataConfig(**settings, filter="prompt_tokens < 20"), tokenizer)
    assert len(kept) == 1


def test_dropping_every_row_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"(?s)no row is left.*longer than data\.max_length=5"):
        tokenize([placed()], tokenizer, 5, "drop")


def test_a_tokenizer_without_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        tokenize([placed()], tokenizer, 100)
