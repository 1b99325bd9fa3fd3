"""Text that is final: what was sent never changes."""

import numpy as np
import pytest

from diffllm.generate import response_of, special_tokens
from launch.serve.forming import FinalText, draft, without_stop
from sampling import Canvas, SamplingConfig, StepEvent, fill
from tests.launch.serve.serving import sure_model


@pytest.fixture(scope="module")
def model():
    return sure_model()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "alg": "left_to_right"},
        {"temperature": 1.0, "alg": "left_to_right", "stop": ["ab", "a", "\n", "12"]},
        {"temperature": 2.0, "block_length": 8, "stop_at_eos": False},
        {"temperature": 1.0, "remask": 0.3},
    ],
    ids=str,
)
def test_what_is_sent_begins_the_response(model, tokenizer, settings):
    config = SamplingConfig(max_new_tokens=24, **settings)
    special = special_tokens(model, tokenizer, config)
    early = 0
    for row_id in range(6):
        final, events = FinalText(tokenizer, config, special.eos), []
        canvas = Canvas.after([row_id + 1, 5], 24, special.mask, row_id)
        [row] = fill(model, [canvas], config, special, on_step=events.append)
        parts = [final.after(event) for event in events]
        response = response_of(row, tokenizer, config)
        assert response.text.startswith("".join(parts))
        assert "".join(parts) + final.rest(response.text) == response.text
        early += bool("".join(parts[:-1]))
    assert (early > 0) == ("remask" not in settings)


def event(tokens: list[int], masked: int, prompt: int = 1) -> StepEvent:
    """A step after which the last `masked` positions are masked."""
    none = np.empty(0, dtype=int)
    hidden = np.arange(len(tokens)) >= len(tokens) - masked
    return StepEvent(0, 0, np.array(tokens), hidden, prompt, none, none, None, none, 1)


def sent(tokenizer, text: str, config: SamplingConfig) -> list[str]:
    """What is sent of a text whose tokens become final one by one."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    final = FinalText(tokenizer, config, [tokenizer.eos_token_id])
    return [final.after(event([1, *ids], len(ids) - n)) for n in range(1, len(ids) + 1)]


def test_characters_are_sent_whole(tokenizer):
    parts = sent(tokenizer, "é😀字", SamplingConfig())
    assert [part for part in parts if part] == ["é", "😀", "字"]
    assert len(parts) > 3


def test_beginnings_of_stop_strings_wait(tokenizer):
    parts = sent(tokenizer, "1213</b>", SamplingConfig(stop=["123", "</a>"]))
    assert "".join(parts[:2]) == ""
    assert "".join(parts[:3]) == "12"
    assert "".join(parts) == "1213</b>"
    assert "".join(sent(tokenizer, "11</a>22", SamplingConfig(stop=["</a>"]))) == "11"


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("abc", [], "abc"),
        ("abc", ["cd"], "ab"),
        ("abc", ["bcd", "cd"], "a"),
        ("abcd", ["bc"], "a"),
        ("aab", ["aabb", "abc"], ""),
        ("abc", ["abc"], ""),
        ("ab", ["b" * 1000], "a"),
    ],
)
def test_without_stop(text, stop, left):
    assert without_stop(text, stop) == left


def test_tokens_of_bytes_wait(tokenizer, monkeypatch):
    """Until one that is not a byte follows: tokenizers with such tokens may decode all of them anew."""
    names = {5: "<0xE4>", 6: "<0xBD>", 7: "a"}
    monkeypatch.setattr(type(tokenizer), "convert_ids_to_tokens", lambda _, id: names[id])
    monkeypatch.setattr(type(tokenizer), "decode", lambda _, ids: "".join(names.get(id, "a .") for id in ids))
    final = FinalText(tokenizer, SamplingConfig(), [])
    assert final.after(event([1, 7, 5, 6, 7], 2)) == "a"
    assert final.after(event([1, 7, 5, 6, 7], 1)) == ""
    assert final.after(event([1, 7, 5, 6, 7], 0)) == "<0xE4><0xBD>a"


def test_a_tokenizer_that_changes_text_before_a_token(tokenizer, monkeypatch):
    decode = type(tokenizer).decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda *given: decode(*given).replace(" .", "."))
    assert not any(sent(tokenizer, "one two three", SamplingConfig()))


def test_a_draft(tokenizer):
    ids = tokenizer("ab", add_special_tokens=False)["input_ids"]
    tokens = [1, *ids, tokenizer.mask_token_id, tokenizer.mask_token_id, *ids, tokenizer.eos_token_id]
    masked = np.array(tokens) == tokenizer.mask_token_id
    none = np.empty(0, dtype=int)
    formed = draft(StepEvent(0, 3, np.array(tokens), masked, 1, none, none, None, none, 4), tokenizer)
    assert formed == {"step": 3, "nfe": 4, "pieces": [{"text": "ab"}, {"masked": 2}, {"text": "ab"}]}
