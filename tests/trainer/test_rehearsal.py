"""What a run says before its first step, and trainer.max_steps=0, which does only that."""

import io
import json
import re
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from data import BatchLayout, TrainBatches
from data.terminal import announced
from diffllm import DiffusionConfig
from diffllm.diffusion import build_objective
from tests.data.rows import prepared, row
from tests.trainer.runs import metrics, train
from trainer.config import Config
from trainer.preview import print_preview, token_table


def test_a_run_says_what_it_is(small_run, capsys):
    config = small_run(trainer__val_check_interval=5, trainer__save_checkpoint_steps=4, trainer__max_steps=8)
    run = train(config)
    printed = capsys.readouterr().out
    described = [line.partition(": ") for line in printed.partition("\nmodel:")[2].splitlines()]
    lines = {"model": described[0][0]} | {name: text.strip() for name, _, text in described[1:9]}
    assert "from scratch" in lines["model"]
    assert "float32, attention sdpa, not compiled" in lines["device"]
    assert lines["batch"].startswith("8 rows a forward × 1 accumulated × 1 rank = 8 rows a step, up to 512 tokens")
    assert lines["steps"] == "8, 0.2 epochs of 320 rows; lr 0.001, 1 of them warm-up, then cosine"
    assert lines["attention"] == "all positions see each other"
    assert lines["validation"] == "40 rows, every 5 steps and at the end"
    kept = sum(file.stat().st_size for file in (run / "checkpoints" / "step_00000008").glob("*.distcp")) / 2**20
    foretold = re.search(r"2 × (.*) MiB for checkpoints, .* (.*) MiB for hf/", lines["files"])
    assert float(foretold[1]) == pytest.approx(kept, rel=0.2)  # the files have headers
    assert float(foretold[2]) == pytest.approx((run / "hf" / "model.safetensors").stat().st_size / 2**20, rel=0.1)
    assert "RANDOM" in lines["note"]  # rows are given, and no model


def test_without_steps_nothing_is_written(small_run, capsys):
    config = small_run(trainer__max_steps=0, trainer__total_epochs=2)
    run = train(config)
    printed = capsys.readouterr().out
    assert not run.exists()
    assert "steps:      80, 2 epochs of 320 rows" in printed
    assert printed.count("with masks:") == 2
    assert "<|im_start|>assistant" in printed


@pytest.mark.parametrize(("free", "warns"), [(0, True), (10**9, False)])
def test_a_disk_that_is_too_small_is_named_and_finished_files_count(small_run, monkeypatch, capsys, free, warns):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    config = small_run(trainer__max_steps=1)
    train(config)
    assert ("ONLY" in capsys.readouterr().out) == warns
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    train(config)
    assert "ONLY" not in capsys.readouterr().out


def test_the_data_report_shows_rows(default_run):
    text = (default_run / "data_report.txt").read_text()
    assert text.startswith("training: 320 of 320 rows")
    assert "train.jsonl:" in text.partition("with masks:")[0]
    assert "⟦" in text


def preview(tokenizer, rows, count=3, terminal=False, **settings):
    config = Config()
    for name, value in settings.items():
        setattr(config.data, name, value)
    tokens, _ = prepared(tokenizer, rows, **settings)
    objective = build_objective(DiffusionConfig(), tokenizer.mask_token_id, 0)
    batches = TrainBatches(
        tokens, config.data, BatchLayout(0, 1, len(tokens), 1), tokenizer.eos_token_id, objective.corrupt, 0
    )
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system="standard" if terminal else None, width=200)
    print_preview(console, batches[0], tokenizer, tokens, count)
    return file.getvalue(), batches[0][0]


def test_trained_and_masked_tokens_cuts_and_padding_are_shown(tokenizer):
    rows = [row("short", answer="x"), row("a longer question", thinking="a " * 30, answer="y")]
    settings = {"max_length": 60, "truncation": "right", "perbatch_cutoff_type": "min_pad"}
    text, batch = preview(tokenizer, rows, count=2, **settings)
    masked = int(batch["masked"].sum())
    assert text.count("▒") == masked + 1  # and in the legend
    heads = [line for line in text.splitlines() if line.startswith("row ")]
    assert len(heads) == 2
    assert sum("cut by data.truncation=right" in head for head in heads) == 1
    assert sum("of padding behind" in head for head in heads) == 1
    assert "{<|endoftext|> × " in text
    assert "⟦<think>" in text
    coloured, _ = preview(tokenizer, rows, count=2, terminal=True, **settings)
    assert "\x1b[32m" in coloured
    assert "⟦" not in coloured


@pytest.mark.parametrize("positions", [0, 4])
def test_a_row_token_by_token(tokenizer, positions):
    _, batch = preview(tokenizer, [row("[b]Hi")], count=1, max_length=60)
    table = token_table(batch, tokenizer, positions)
    cells = list(zip(*(map(str, column.cells) for column in table.columns), strict=True))
    assert len(cells) == (positions or int(batch["attention_mask"].sum()))
    assert cells[3] == ("3", "'['", "prompt", "no", "no")
    if not positions:
        last = int(batch["row_tokens"]) - 1
        assert cells[last][1:4] == ("'<|endoftext|>'", "end", "yes")
        assert [trained for *_, trained, _ in cells].count("yes") == int(batch["maskable"].sum())
        assert [masked for *_, masked in cells].count("yes") == int(batch["masked"].sum())


def test_control_characters_of_rows_are_escaped_and_long_rows_clipped(tokenizer):
    text, _ = preview(tokenizer, [row("\x1b[31mred", answer="b" * 5000)], count=1, max_length=8000)
    assert "\x1b" not in text
    assert r"\x1b[31mred" in text
    assert "characters …" in text
    assert len(text) < 6000


@pytest.mark.parametrize(
    ("rank", "terminal", "seconds", "said"),
    [("0", True, 0.01, "reading\\x1b …\n"), ("1", True, 0.01, ""), ("0", False, 0.01, ""), ("0", True, 60, "")],
)
def test_work_that_takes_long_is_named_on_a_terminal(monkeypatch, rank, terminal, seconds, said):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with announced("reading\x1b", seconds):
        deadline = time.monotonic() + (30 if said else 0.1)
        while time.monotonic() < deadline and not sys.stderr.getvalue():
            time.sleep(0.01)
    assert sys.stderr.getvalue() == said


def test_a_part_of_the_rows_is_held_out(small_run):
    run = train(small_run(data__val_files=[], data__val_split=0.1, trainer__max_steps=2))
    report = json.loads((run / "data_report.json").read_text())
    assert (report["training"]["kept"], report["validation"]["kept"]) == (288, 32)
    assert "val/elbo" in metrics(run)[-1]


def test_a_stream_is_shown_too(small_run, capsys):
    run = train(small_run(data__streaming=True, trainer__max_steps=0))
    assert not run.exists()
    assert capsys.readouterr().out.count("with masks:") == 2


def test_a_checkpoint_to_resume_from_is_named_or_missed(small_run, capsys):
    run = train(small_run(trainer__max_steps=2))
    capsys.readouterr()
    train(small_run(trainer__max_steps=0))
    assert str(run / "checkpoints" / "step_00000002") in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"trainer\.resume=nowhere"):
        train(small_run("other", trainer__max_steps=0, trainer__resume="nowhere"))
