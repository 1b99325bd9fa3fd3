"""Recordings of sample.py: they hold what the events hold, and characters that several tokens share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data import prompt_ids
from diffllm.generate import special_tokens
from launch import answers
from launch.answers import answer
from launch.chat import chat
from launch.recording import Pieces, Recorder
from sampling import Canvas, SamplingConfig, StepEvent, Tokens, fill
from sampling.recording import read
from sampling.render.page import page
from trainer.config import Config


@pytest.fixture
def config(small_model, tokenizer, tmp_path, monkeypatch) -> Config:
    monkeypatch.setattr(answers, "load_for_sampling", lambda *_: (small_model, tokenizer))
    sampling = SamplingConfig(max_new_tokens=12, steps=6, temperature=1.0, remask=0.4)
    return Config(sampling=sampling, record=str(tmp_path / "made" / "run.jsonl"))


def test_a_recording_holds_the_events(config, small_model, tokenizer, capsys):
    answer(replace(config, prompt="Hi"))
    recording = read(Path(config.record))
    prompt = prompt_ids([{"role": "user", "content": "Hi"}], tokenizer)
    special, events = special_tokens(small_model, tokenizer, config.sampling), []
    canvas = Canvas.after(prompt, 12, special.mask)
    [row] = fill(small_model, [canvas], config.sampling, special, on_step=events.append)
    assert any(len(event.remasked) for event in events)
    for step, event in zip(recording.steps, events, strict=True):
        assert (step.step, step.nfe, step.remasked) == (event.step, event.nfe, event.remasked.tolist())
        assert [each.position for each in step.committed] == event.committed.tolist()
        assert [each.id for each in step.committed] == event.tokens[event.committed].tolist()
        np.testing.assert_allclose([each.prob for each in step.committed], event.probs, rtol=1e-5)
        np.testing.assert_allclose([each.entropy for each in step.committed], event.entropies, rtol=1e-5)
    header, result = recording.header, recording.result
    assert (header.prompt, header.prompt_length, header.masked) == ("Hi", len(prompt), 12)
    assert header.sampling["seed"] == 0
    assert result.text + "\n" == capsys.readouterr().out
    assert (result.nfe, result.tokens) == (row.nfe, row.new_tokens)
    *_, last = recording.canvases()
    clean = [token for token, cell in zip(row.tokens, last, strict=True) if not cell.unused]
    assert [cell.id for cell in last if not cell.unused] == clean
    page(recording).encode()


def test_positions_behind_the_end_are_unused(config, small_model, tokenizer, monkeypatch):
    """The first token ends the response."""
    small_model.generation = {"eos_token_id": [*range(small_model.mask_token_id)]}
    answer(replace(config, prompt="Hi", sampling=SamplingConfig(max_new_tokens=8, alg="left_to_right")))
    *_, last = read(Path(config.record)).canvases()
    assert [cell.unused for cell in last[-8:]] == [False, *[True] * 7]


def test_tokens_that_the_end_replaces_are_unused(config, tokenizer):
    """Also one of an earlier step, and one of the same step."""
    mask, end = tokenizer.mask_token_id, tokenizer.eos_token_id
    recorder = Recorder(config, tokenizer, Canvas.after([5], 4, mask), Tokens(mask, (end,)), 1)
    none = np.empty(0, dtype=int)

    def event(tokens, committed, stop):
        tokens, committed = np.array(tokens), np.array(committed)
        return StepEvent(0, 0, tokens, tokens == mask, 1, committed, np.full(len(committed), 0.5), None, none, 1, stop)

    recorder.step(event([5, mask, mask, 7, mask], [3], None))
    step = recorder.step(event([5, end, end, end, end], [1, 2], 2))
    assert [(each.position, each.id) for each in step.committed] == [(1, end)]
    assert step.unused == [2, 3, 4]
    assert step.texts == []


def test_a_drawn_mask_is_no_commit(config, tokenizer):
    mask = tokenizer.mask_token_id
    recorder = Recorder(config, tokenizer, Canvas.after([5], 2, mask), Tokens(mask), 1)
    tokens, none = np.array([5, mask, 7]), np.empty(0, dtype=int)
    step = recorder.step(
        StepEvent(0, 0, tokens, tokens == mask, 1, np.array([1, 2]), np.array([0.1, 0.2]), None, none, 1)
    )
    assert [(each.position, each.prob) for each in step.committed] == [(2, 0.2)]


@pytest.mark.parametrize("prompt", [None, "Hi"])
def test_of_the_lengths_of_a_template_the_one_taken_is_recorded(config, tokenizer, capsys, prompt):
    answer(replace(config, prompt=prompt, template="x = <|mask:1-4|>!"))
    recording = read(Path(config.record))
    assert recording.result.text + "\n" == capsys.readouterr().out
    filled = sum(len(step.committed) - len(step.remasked) for step in recording.steps)
    assert recording.header.masked == recording.result.tokens == filled
    length = len(prompt_ids([{"role": "user", "content": prompt}], tokenizer)) if prompt else 0
    assert recording.header.prompt_length == length
    *_, last = recording.canvases()
    shown = "".join(cell.text for cell in last[length:])
    assert shown.removesuffix("<|endoftext|>") == recording.result.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "rows.jsonl", "output": "out.jsonl"}, "goes with prompt=… or template=…"),
        ({"prompt": "Hi", "record": "run.json"}, r"record=run\.json: give record=FILE\.jsonl"),
        ({"prompt": "Hi", "record": "OLD"}, "exists already"),
    ],
)
def test_a_record_that_cannot_be_written(config, changes, message, tmp_path):
    old = tmp_path / "old.jsonl"
    old.write_text("precious")
    if changes.get("record") == "OLD":
        changes = changes | {"record": str(old)}
    with pytest.raises(ValueError, match=message):
        answer(replace(config, **changes))
    assert old.read_text() == "precious"


def test_a_chat_is_not_recorded(config):
    with pytest.raises(ValueError, match="record="):
        chat(config)


def test_nothing_is_left_of_a_sampling_that_stops(config, monkeypatch, tmp_path):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "respond", stopped)
    with pytest.raises(KeyboardInterrupt):
        answer(replace(config, prompt="Hi"))
    assert [*tmp_path.rglob("*.jsonl*")] == []


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_character_of_several_tokens_is_whole_when_they_are(bytes_tokenizer):
    tokens = bytes_tokenizer("aé你🙂")["input_ids"]
    pieces = Pieces(bytes_tokenizer)
    known = [True] * len(tokens)
    assert pieces.texts(tokens, known) == ["a", "é", "", "你", "", "", "🙂", "", "", ""]
    known[4] = known[9] = False
    broken = ["\ufffd", "", "\ufffd", *["\ufffd"] * 3, ""]
    assert pieces.texts(tokens, known) == ["a", "é", "", *broken]


@pytest.mark.parametrize("text", ["a", "é", "你好\n🙂 b", "\x1b[31m"])
def test_pieces_join_to_the_text(bytes_tokenizer, text):
    tokens = bytes_tokenizer(text)["input_ids"]
    assert "".join(Pieces(bytes_tokenizer).texts(tokens, [True] * len(tokens))) == text


def test_bytes_that_are_no_character_stay(bytes_tokenizer):
    first = bytes_tokenizer("🙂")["input_ids"][0]
    assert Pieces(bytes_tokenizer).texts([first] * 6, [True] * 6) == ["\ufffd"] * 6
