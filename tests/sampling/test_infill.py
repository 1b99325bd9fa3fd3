"""Slots in texts: what is given stays, what is missing is filled in, and an unknown length is found."""

import warnings
from dataclasses import replace
from math import log

import pytest
import torch

from diffllm import new_model
from sampling import SamplingConfig, Template, Tokens, infill, infill_templates, score_positions
from sampling.config import CACHES
from sampling.policies import SCHEDULED
from tests.conftest import ROOT, small_shape

SOURCE = (ROOT / "sampling/schedule.py").read_text()
START = SOURCE.index("    if step == steps - 1:")
FUNCTION = SOURCE[START : SOURCE.index("@lru_cache")]


class Known:
    """Says `likely` with probability 0.9 in rows of `length` tokens and 0.3 in others; all else alike, but `first`.

    `first` are tokens that it likes better still, and is not to give.
    """

    device, vocab_size = torch.device("cpu"), 1260

    def __init__(self, likely, length=0, first=()):
        self.likely, self.length, self.first = likely, length, list(first)

    def hidden(self, x_t, position_ids, visibility, row, column, cache=None):
        attended = torch.ones_like(x_t) if visibility.attended is None else visibility.attended
        p = torch.where(attended.sum(-1)[row] == self.length, 0.9, 0.3)
        logits = ((1 - p) / (self.vocab_size - 1)).log()[:, None].repeat(1, self.vocab_size)
        logits[:, self.likely] = p.log()
        logits[:, self.first] = 5.0
        return logits

    def head(self, hidden):
        return hidden.clone()


@pytest.fixture
def special(tokenizer):
    return Tokens(mask=tokenizer.mask_token_id, eos=(tokenizer.eos_token_id,))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def blanked():
    """Each line of a function of the project, with the text before and after it, as HumanEval's infilling has them."""
    lines = FUNCTION.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.strip():
            yield "".join(lines[:number]), line, "".join(lines[number + 1 :])


@pytest.fixture(scope="module")
def lines(tokenizer):
    """Templates of all lines, filled in together, and the model, texts and settings they were filled with."""
    torch.manual_seed(0)
    model = new_model(small_shape(), tokenizer).eval()
    texts, config = list(blanked()), SamplingConfig(steps=8, temperature=0.7, seed=1, batch_size=3)
    templates = [Template((before, after), ((len(ids(tokenizer, line)),),)) for before, line, after in texts]
    return model, texts, config, infill_templates(model, tokenizer, templates, config, model.special_tokens)


def test_a_line_is_filled_in_between_what_is_given(lines, tokenizer):
    _, texts, _, filled = lines
    assert len(texts) > 4
    for (before, line, after), result in zip(texts, filled, strict=True):
        start, stop = len(ids(tokenizer, before)), len(ids(tokenizer, before + line))
        assert result.text == before + result.slots[0] + after
        assert result.tokens[:start] == ids(tokenizer, before)
        assert result.tokens[stop:] == ids(tokenizer, after)
        assert result.length == stop - start
        assert result.slots == [tokenizer.decode(result.tokens[start:stop])]
        assert not set(result.tokens) & set(tokenizer.all_special_ids)
        assert result.scores == {}


def test_a_line_does_not_depend_on_the_others(lines, tokenizer):
    model, texts, config, filled = lines
    for name in (0, len(texts) - 1):
        before, _, after = texts[name]
        length = filled[name].length
        assert (
            infill(model, tokenizer, before, after, length, config, model.special_tokens, row_id=name) == filled[name]
        )


@pytest.mark.parametrize("changes", [{"transfer": transfer} for transfer in SCHEDULED] + [
    {"transfer": "threshold"}, {"remask": 0.5}, {"cfg_scale": 1.0}, {"block_length": 4}, {"min_new_tokens": 4},
    {"eos_penalty": 1.0}, *({"cache": cache, "block_length": 4} for cache in CACHES if cache != "block"),
])  # fmt: skip
def test_every_policy_fills_slots_and_nothing_else(small_model, tokenizer, changes):
    template = Template.parse("def f(<|mask:3|>):\n    return <|mask:9|>  # café\n")
    config = SamplingConfig(steps=6, **changes)
    [result] = infill_templates(small_model, tokenizer, [template], config, small_model.special_tokens)
    arguments, value = result.slots
    assert result.text == f"def f({arguments}):\n    return {value}  # café\n"
    canvas = template.canvases(tokenizer, tokenizer.mask_token_id)[0].tokens
    assert all(before in (after, tokenizer.mask_token_id) for before, after in zip(canvas, result.tokens, strict=True))
    assert not set(result.tokens) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize(("block", "after", "hidden"), [(4, "c", True), (4, "", False), (8, "c", False)])
def test_text_that_blocks_hide_is_warned_of(tokenizer, special, block, after, hidden):
    model = Known(*ids(tokenizer, "x"))
    model.block_length = block
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        infill(model, tokenizer, "ab", after, 3, SamplingConfig(steps=2, cache="none"), special)
    assert [f"blocks of {block}" in str(each.message) for each in caught] == [True] * hidden


def test_nothing_ends_an_infill(tokenizer, special):
    """Neither end-of-sequence, which may be given, nor a stop sequence, mask or other special tokens."""
    [x], [end] = ids(tokenizer, "x"), ids(tokenizer, "$")
    model = Known(x, first=[*tokenizer.all_special_ids, end])
    special = replace(special, stop=((x,),), eos=(end,), is_complete=lambda response: True)
    result = infill(model, tokenizer, "a<|endoftext|>", "<|im_end|>\nb", 3, SamplingConfig(steps=2), special)
    assert result.text == "a<|endoftext|>xxx<|im_end|>\nb"


def test_forbidden_tokens_stay_forbidden(tokenizer, special):
    [x], [y] = ids(tokenizer, "x"), ids(tokenizer, "y")
    config, special = SamplingConfig(steps=2), replace(special, forbidden=(x,))
    assert infill(Known(y, first=[x]), tokenizer, "a", "b", 2, config, special).text == "ayyb"


@pytest.mark.parametrize("wanted", [2, 5, 8])
def test_the_length_with_the_best_score_is_taken(tokenizer, special, wanted):
    """The rows are `ab`, the slot and `c`; at the wanted length log p is log 0.9 a token, at others log 0.3."""
    model = Known(*ids(tokenizer, "x"), length=3 + wanted)
    result = infill(model, tokenizer, "ab", "c", range(2, 9), SamplingConfig(steps=4, batch_size=5), special)
    assert result.text == "ab" + wanted * "x" + "c"
    assert result.length == wanted
    assert list(result.scores) == [*range(2, 9)]
    for length, score in result.scores.items():
        assert score.per_token == pytest.approx(log(0.9 if length == wanted else 0.3), rel=1e-4)
        assert score.tokens == length


def test_of_equal_lengths_the_shortest_is_taken_in_whatever_order_they_are_given(tokenizer, special):
    result = infill(Known(*ids(tokenizer, "x")), tokenizer, "a", "b", [2, 1, 2], SamplingConfig(), special)
    assert result.text == "axb"
    assert list(result.scores) == [1, 2]


def test_a_length_is_filled_in_as_if_no_other_had_been_tried(small_model, tokenizer):
    config, special = SamplingConfig(steps=4, temperature=1.0), small_model.special_tokens
    tried = infill(small_model, tokenizer, "1 + 2 = ", "!", [3, 9, 6], config, special, samples=4)
    alone = infill(small_model, tokenizer, "1 + 2 = ", "!", tried.length, config, special)
    assert alone.tokens == tried.tokens
    slot = range(len(ids(tokenizer, "1 + 2 = ")), len(tried.tokens) - 1)
    [score] = score_positions(small_model, [(tried.tokens, slot)], special, samples=4)
    assert score.mean == pytest.approx(tried.scores[tried.length].mean, rel=1e-5)
    assert tried.length == max(tried.scores, key=lambda length: tried.scores[length].per_token)


def test_one_of_several_slots_may_be_of_unknown_length(tokenizer, special):
    """Scores go by the number of all tokens filled in."""
    model = Known(*ids(tokenizer, "x"), length=9)
    template = Template.parse("a<|mask:2|>b<|mask:1-5|>c")
    [result] = infill_templates(model, tokenizer, [template], SamplingConfig(), special)
    assert result.text == "axxbxxxxc"
    assert result.slots == ["xx", "xxxx"]
    assert list(result.scores) == [3, 4, 5, 6, 7]
    assert result.length == 6


def test_a_template_becomes_a_canvas(tokenizer):
    mask = tokenizer.mask_token_id
    [canvas] = Template.parse("12 <|mask:2|>, é<|mask:1|>").canvases(tokenizer, mask, row_id=7)
    assert canvas.tokens == [*ids(tokenizer, "12 "), mask, mask, *ids(tokenizer, ", é"), mask]
    assert canvas.prompt_length == canvas.slots[0].start == 2
    assert canvas.slots == (range(2, 4), range(8, 9))
    assert canvas.row_id == 7
    lengths = [len(canvas.tokens) for canvas in Template.parse("<|mask:4-6|>").canvases(tokenizer, mask)]
    assert lengths == [4, 5, 6]


def test_a_prefix_is_raw_text(tokenizer, special):
    result = infill(Known(*ids(tokenizer, "x")), tokenizer, "<|mask:3|>", "", 2, SamplingConfig(), special)
    assert result.text == "<|mask:3|>xx"
    result = infill(Known(*ids(tokenizer, "x")), tokenizer, "", "", 2, SamplingConfig(), special)
    assert result.text == "xx"


@pytest.mark.parametrize(
    "slot",
    ["<|mask|>", "<|mask:|>", "<|mask:0|>", "<|mask:x|>", "<|mask:-3|>", "<|mask:4-|>", "<|mask:9-4|>", "<|mask:0-4|>",
     "<|mask: 4|>", "<|mask 4|>", "<|mask:1.5|>", "<|mask:٣|>"],
)  # fmt: skip
def test_slots_that_are_not_of_the_form(slot):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Template.parse(f"a<|mask:2|>b{slot}c")
    assert str(error.value).startswith(f"slot {slot}: write <|mask:12|>")
    assert "\n" not in str(error.value)


def test_templates_that_cannot_be_filled_in(tokenizer, special):
    for text in ("", "a", "a <mask:3> b", "a <|mask_x|> b"):
        with pytest.raises(ValueError, match="the template has no slot"):
            Template.parse(text)
    with pytest.raises(ValueError, match="2 slots are of unknown length"):
        Template.parse("<|mask:1-2|>, <|mask:3|>, <|mask:1-2|>")
    with pytest.raises(ValueError, match="1 pieces around 1 slots"):
        Template(("a",), ((1,),))
    for length, shown in ((0, r"\[0\]"), ([], r"\[\]"), ([3, -1], r"\[3, -1\]")):
        with pytest.raises(ValueError, match=f"a slot has lengths {shown}"):
            infill(Known(0), tokenizer, "a", "b", length, SamplingConfig(), special)
    with pytest.raises(ValueError, match=r"the mask token '<\|mask\|>' is in the text 'b<\|mask\|>'"):
        infill(Known(0), tokenizer, "a", "b<|mask|>", 1, SamplingConfig(), special)


def test_a_slot_of_too_many_lengths():
    with pytest.raises(ValueError, match=r"slot <\|mask:4-100000000\|>: 99,999,997 lengths to try, at most 256"):
        Template.parse("a <|mask:4-100000000|>")
    assert len(Template.parse("a <|mask:1-256|>").slots[0]) == 256
