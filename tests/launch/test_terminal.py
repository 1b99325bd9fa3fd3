"""Control characters of models, rows and file names never reach the terminal."""

import io
import json
import sys
import unicodedata
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data import prepare
from data.report import Report
from data.terminal import printable
from diffllm import adapt
from diffllm.generate import Response
from launch import answers, cli, evaluation
from launch.chat import Conversation
from launch.drawing import draft
from sampling import SamplingConfig, StepEvent
from trainer import evaluation as engine
from trainer import export, replay
from trainer.config import Config
from trainer.fsdp_sft_trainer import FSDPSFTTrainer

HOSTILE = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://a.b\x1b\\c\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;aGk=\x07",
    "C1": "\x9b2Jgone",
    "overwritten": "failed\rpassed",
    "erased": "no\x08\x08ok",
    "NUL": "a\x00b",
    "vertical": "a\x0b\x0cb",
    "DEL": "a\x7fb",
    "reversed": "a\u202eb\u202c",
    "isolated": "a\u2066\u2067\u2068b\u2069",
    "marked": "a\u061c\u200eb\u200f",
    "embedded": "a\u202a\u202b\u202db",
}
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
hostile = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


def assert_shown(text, shown):
    """As it can be printed, and nothing of it raw."""
    assert not [c for c in shown if c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Cs") or c in BIDI)]
    assert printable(text) in shown


@settings(deadline=None)
@given(st.text(st.characters()))
def test_what_is_printable_can_be_printed_and_other_text_stays(text):
    assert_shown(text, printable(text))
    printable(text).encode()
    assert printable(printable(text)) == printable(text)


def test_text_stays_as_it_is():
    for text in ("", "naïve café,\n\tדבר 你好 \U0001f600 👩‍👩‍👧", "\\x1b", "a\u00a0b\u200bc"):
        assert printable(text) == text
    assert printable("\x1b[0m\x7f\x9b\r\u202e\ud800") == r"\x1b[0m\x7f\x9b\x0d\u202e\ud800"


@pytest.fixture
def config(small_model, tokenizer, monkeypatch, tmp_path) -> Config:
    """Of a model that answers what the test says."""
    for module in (answers, evaluation):
        monkeypatch.setattr(module, "load_for_sampling", lambda *_: (small_model, tokenizer))
    config = Config(sampling=SamplingConfig(max_new_tokens=4, steps=2))
    config.trainer.output_dir = str(tmp_path)
    return config


@hostile
def test_a_response_on_a_terminal(config, monkeypatch, capsys, text):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(answers, "respond", lambda *_: Response(0, text, 1, 1, 1.0, True))
    answers.answer(replace(config, prompt="Hi"))
    assert_shown(text, capsys.readouterr().out)


@hostile
def test_a_response_in_a_pipe_is_exact(config, monkeypatch, capsys, text):
    monkeypatch.setattr(answers, "respond", lambda *_: Response(0, text, 1, 1, 1.0, True))
    answers.answer(replace(config, prompt="Hi"))
    assert capsys.readouterr().out == text + "\n"


@hostile
def test_a_template_on_a_terminal(config, monkeypatch, capsys, text):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    answers.answer(replace(config, template=f"{text}<|mask:2|>"))
    assert_shown(text, capsys.readouterr().out)


@hostile
def test_a_chat(small_model, tokenizer, monkeypatch, text):
    console = Console(file=io.StringIO(), width=200)
    chat = Conversation(small_model, tokenizer, SamplingConfig(stop=[text]), console, None)
    monkeypatch.setattr("launch.chat.respond", lambda *_: Response(0, text, 1, 1, 1.0, True))
    chat.take("Hi")
    assert chat.turns[-1]["content"] == text
    assert_shown(text, console.file.getvalue())
    chat.take(f"/{text}")
    chat.take(f"/set {text} 1")
    chat.take("/settings")
    assert_shown(text, console.file.getvalue())

    tokens = np.array(tokenizer(text)["input_ids"])
    none = np.empty(0, dtype=int)
    event = StepEvent(0, 0, tokens, tokens == tokenizer.mask_token_id, 0, none, none, None, none, 1)
    assert_shown(text, draft(event, tokenizer).plain)


@hostile
def test_the_table_of_an_evaluation(config, monkeypatch, capsys, tmp_path, text):
    rows = [{"question": text, "answer": "<think></think>2"}, {text: 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.val_files, config.data.on_bad_row = [str(tmp_path / "rows.jsonl")], "skip"
    monkeypatch.setattr(engine, "generate", lambda *_: iter([Response(0, text, 1, 1, 1.0, True)]))
    monkeypatch.setenv("COLUMNS", "300")
    evaluation.evaluate(config)
    shown, progress = capsys.readouterr()
    assert_shown(text, shown)
    assert shown.count(printable(text)) == 3  # the row that cannot be used, question and response
    assert text not in progress


@hostile
def test_an_error(capsys, text):
    with pytest.raises(SystemExit), cli.user_errors(debug=False):
        raise ValueError(f"{text}: no such file")
    assert_shown(text, capsys.readouterr().err)


TOOLS = {
    "prepare": (lambda text: prepare.main(["gsm8k", "out.jsonl", text])),
    "adapt": (lambda text: adapt.main([text, "out"])),
    "export": (lambda text: export.main([text, "out"])),
    "replay": (lambda text: replay.main([text, "out"])),
}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
@pytest.mark.parametrize("name", ["colour", "C1", "reversed"])
def test_errors_of_the_other_commands(name, tool, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        tool(HOSTILE[name])
    assert str(end.value).startswith("error: ")
    assert_shown(HOSTILE[name], str(end.value))


@hostile
def test_reports_and_progress(capsys, text):
    report = Report(text, read=3, kept=1, sources={f"{text}.jsonl": 1, "b": 0})
    report.drop(text, f"{text}:1")
    assert_shown(text, report.text())
    FSDPSFTTrainer.print_main(SimpleNamespace(distributed=SimpleNamespace(is_main=True)), f"resumed from {text}")
    assert_shown(text, capsys.readouterr().out)
