"""Keys and values kept between steps, with a real decoder in float64 so that rounding decides nothing."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffllm import DiffLLM, new_model
from sampling import Canvas, SamplingConfig, fill, sample
from sampling.cache import computed
from sampling.policies import ADAPTIVE, ALGS, SCHEDULED
from sampling.row_state import RowState, Step
from tests.conftest import small_shape
from tests.sampling.models import unpadded

CACHES = ["prefix", "dual", "delayed"]


@pytest.fixture(scope="module", params=["dream", "llada"])
def model(request, tokenizer) -> DiffLLM:
    return new_model(small_shape(family=request.param, initializer_range=0.3), tokenizer).double().eval()


def fill_rows(model, rows, history=True, **changes):
    """Filled rows by name, of (prompt, new tokens) pairs."""
    config = SamplingConfig(**{"steps": 6, "stop_at_eos": False, **changes})
    mask = model.mask_token_id
    canvases = [Canvas.after(prompt, new, mask, name) for name, (prompt, new) in enumerate(rows)]
    filled = {row.canvas.row_id: row for row in fill(model, canvases, config, model.special_tokens, history=history)}
    return [filled[name] for name in range(len(rows))]


ROWS = [([5, 6, 7, 8, 9], 12), ([20, 21], 9), ([40, 41, 42], 12), ([60], 5)]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_refreshed_every_step_a_cache_is_exact(model, cache, cfg_scale):
    settings = {"block_length": 4, "cfg_scale": cfg_scale, "batch_size": 2}
    for cached, plain in zip(
        fill_rows(model, ROWS, cache=cache, cache_refresh=1, **settings),
        fill_rows(model, ROWS, **settings),
        strict=True,
    ):
        np.testing.assert_array_equal(cached.history, plain.history)


def test_a_cache_that_is_not_refreshed_is_used(model):
    """Else the test above would say nothing: without refresh the approximation shows."""
    plain = fill_rows(model, ROWS, steps=64, block_length=4)
    for cache in CACHES:
        cached = fill_rows(model, ROWS, steps=64, cache=cache, block_length=4)
        assert [row.tokens for row in cached] != [row.tokens for row in plain], cache


def test_what_is_masked_again_in_a_finished_block_is_computed_again(model):
    config = SamplingConfig(steps=16, block_length=4, remask=0.9, transfer="even", cache="dual", stop_at_eos=False)
    mask = model.mask_token_id
    row = RowState(Canvas.after([5, 6], 8, mask), config, model.special_tokens)
    row.tokens[2:6], row.committed = 40, np.array([3])
    row.step = Step(8, 6, 10, False, 1)
    assert np.flatnonzero(computed(row)).tolist() == [2, 3, 5, 6, 7, 8, 9]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(st.lists(st.integers(4, 90), max_size=5), st.integers(1, 9)), min_size=2, max_size=4),
    batch_size=st.integers(2, 3),
    cache=st.sampled_from(CACHES),
    cache_refresh=st.sampled_from([None, 1, 3]),
    block_length=st.sampled_from([None, 2, 4]),
    transfer=st.sampled_from(["even", "threshold"]),
    threshold=st.sampled_from([0.05, 0.2]),
    remask=st.sampled_from([0.0, 0.5]),
    eos_confidence=st.sampled_from(["keep", "suppress"]),
    cfg_scale=st.sampled_from([0.0, 0.5]),
)
def test_a_row_does_not_depend_on_its_batch(model, rows, **changes):
    if changes["transfer"] == "threshold":
        changes["remask"] = 0.0
    for name, together in enumerate(fill_rows(model, rows, **changes)):
        alone = fill_rows(model, [*[([5], 1)] * name, rows[name]], **changes | {"batch_size": 1})[name]
        np.testing.assert_array_equal(together.history, alone.history)
        assert together.nfe == alone.nfe


@pytest.fixture
def by_blocks(model, monkeypatch) -> DiffLLM:
    """The model, attending by blocks of 4."""
    monkeypatch.setattr(model, "block_length", 4)
    return model


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.lists(st.integers(4, 90), max_size=9), st.integers(1, 13)), min_size=1, max_size=4),
    batch_size=st.integers(1, 3),
    block_length=st.sampled_from([None, 1, 2, 4]),
    kind=st.sampled_from(["block", "prefix", "dual", "delayed"]),
    alg=st.sampled_from([*ALGS]),
    transfer=st.sampled_from([*SCHEDULED, *ADAPTIVE]),
    steps=st.sampled_from([None, 3, 8]),
    temperature=st.sampled_from([0.0, 0.7]),
    remask=st.sampled_from([0.0, 0.5]),
    stop_at_eos=st.booleans(),
    cfg_scale=st.sampled_from([0.0, 0.5]),
)
def test_finished_blocks_are_kept_exactly(by_blocks, rows, kind, **changes):
    """Cached equals uncached for every strategy, as rows of unequal lengths come and go.

    The approximate kinds are exact if they are refreshed at every step.
    """
    if changes["transfer"] in ADAPTIVE:
        changes |= {"remask": 0.0, "threshold": 0.2}
    cached, plain = (fill_rows(by_blocks, rows, cache=each, cache_refresh=1, **changes) for each in (kind, "none"))
    for kept, computed_anew in zip(cached, plain, strict=True):
        np.testing.assert_array_equal(kept.history, computed_anew.history)
        assert kept.nfe == computed_anew.nfe


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_what_follows_the_open_block_is_left_out_exactly(by_blocks, cfg_scale):
    """Hooks get the logits of whole rows, aligned at the right."""
    config = SamplingConfig(steps=7, max_new_tokens=11, stop_at_eos=False, cfg_scale=cfg_scale)
    prompts, attended = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 20, 21, 22]]), torch.ones(2, 5)
    attended[1, :2] = 0
    arguments = by_blocks, prompts, config, by_blocks.special_tokens, attended
    whole = sample(*arguments, history=True, tokens_hook=lambda step, tokens, logits: tokens)
    grown = sample(*arguments, history=True)
    assert torch.equal(torch.stack(grown.history), torch.stack(whole.history))


@pytest.mark.parametrize("cache", ["block", "none"])
def test_the_limit_of_a_response_costs_nothing(by_blocks, cache):
    """Rows end after 12 tokens, at which the longest forward sees three blocks."""

    def tokens_and_widths(limit):
        masks = []
        handle = by_blocks.lm.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"].shape[-1]), with_kwargs=True
        )
        config = SamplingConfig(steps=limit, stop_at_eos=False, cache=cache)
        canvases = [Canvas.after(prompt, limit, by_blocks.mask_token_id) for prompt in ([5, 6, 7], [20, 21])]
        arguments = by_blocks, canvases, config, by_blocks.special_tokens
        rows = [*fill(*arguments, criterion=lambda tokens: len(tokens) == 12)]
        handle.remove()
        return [row.tokens[:12] for row in rows], masks

    short, long = tokens_and_widths(10), tokens_and_widths(51)
    assert short == long
    assert max(long[1]) == 12


@pytest.mark.parametrize("transfer", [*SCHEDULED])
def test_without_a_number_of_steps_each_commits_one_token(by_blocks, transfer):
    """Whatever the prompt leaves of the first block, and the limit of the last."""
    rows = [([5] * prompt, limit) for prompt in range(1, 5) for limit in (1, 7, 12)]
    assert [row.nfe for row in fill_rows(by_blocks, rows, steps=None, transfer=transfer)] == [new for _, new in rows]


@pytest.mark.parametrize("changes", [{"alg": "origin"}, {"alg_temp": 0.5, "temperature": 0.7}, {"remask": 0.5}])
def test_the_limit_changes_no_draw(by_blocks, changes):
    short, long = (
        fill_rows(by_blocks, [([5, 6, 7], new)], steps=None, transfer="even", **changes)[0].tokens for new in (9, 40)
    )
    assert short[:12] == long[:12]


def test_a_row_ends_though_tokens_may_be_masked_again(by_blocks):
    """A finished block is final. The row ends with the block after its end."""
    config = SamplingConfig(stop_at_eos=False, remask=0.3, transfer="even")
    canvas = Canvas.after([5, 6, 7], 49, by_blocks.mask_token_id)
    arguments = by_blocks, [canvas], config, by_blocks.special_tokens
    (row,) = fill(*arguments, criterion=lambda tokens: len(tokens) == 10)
    assert row.new_tokens == 7
    assert row.nfe <= 12


def test_a_logits_processor_gets_whole_canvases(by_blocks):
    """So that what it counts in a row does not depend on the other rows."""
    from transformers import NoRepeatNGramLogitsProcessor

    def tokens(rows):
        config = SamplingConfig(stop_at_eos=False, transfer="threshold", threshold=0.3, batch_size=2)
        canvases = [Canvas.after(prompt, new, by_blocks.mask_token_id, i) for i, (prompt, new) in enumerate(rows)]
        processor = NoRepeatNGramLogitsProcessor(2)
        filled = fill(by_blocks, canvases, config, by_blocks.special_tokens, logits_processor=processor)
        return next(row.tokens for row in filled if row.canvas.row_id == 0)

    assert tokens([([5, 6, 7], 9)]) == tokens([([5, 6, 7], 9), ([*range(30, 44)], 9)])

    seen = []
    config = SamplingConfig(max_new_tokens=11, stop_at_eos=False)
    arguments = by_blocks, torch.tensor([[5, 6, 7]]), config, by_blocks.special_tokens
    sample(*arguments, logits_processor=lambda tokens, scores: seen.append(tokens.shape[1]) or scores)
    assert {*seen} == {14}


def test_a_kept_block_never_holds_a_mask(by_blocks, monkeypatch):
    """Though the model prefers the mask, and the published schedules may commit it."""
    head, mask = by_blocks.head, by_blocks.mask_token_id
    preferring = torch.nn.functional.one_hot(torch.tensor(mask), by_blocks.vocab_size) * 100.0
    monkeypatch.setattr(by_blocks, "head", lambda hidden: head(hidden) + preferring)
    cached, plain = (fill_rows(by_blocks, ROWS, cache=cache) for cache in ("block", "none"))
    for kept, computed_anew in zip(cached, plain, strict=True):
        assert mask not in kept.tokens
        np.testing.assert_array_equal(kept.history, computed_anew.history)


def test_a_block_is_computed_with_the_one_before_it_and_then_alone(by_blocks):
    """Prompt 5, so that the first block has three masks; then blocks of 4 and 1. Left neighbours are computed too."""
    widths = []
    handle = by_blocks.lm.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    fill_rows(by_blocks, [([5, 6, 7, 8, 9], 8)], steps=6, transfer="even")
    handle.remove()
    assert widths == [8, 5, 9, 5, 5, 6]


def test_inside_a_block_the_dual_cache_computes_a_part_of_it(by_blocks):
    widths = []
    handle = by_blocks.lm.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    fill_rows(by_blocks, [([5, 6, 7, 8], 4)], steps=4, transfer="even", cache="dual", block_length=2)
    handle.remove()
    assert widths == [8, 3, 5, 3]


def test_a_finished_block_does_not_depend_on_what_follows(by_blocks):
    short, long = (fill_rows(by_blocks, [([5, 6, 7, 8, 9], new)], steps=None)[0].tokens for new in (3, 11))
    assert short == long[: len(short)]


def test_blocks_of_attention_are_needed_and_divided(model, by_blocks):
    with pytest.raises(ValueError, match=r"sampling\.block_length=3: must divide 4"):
        fill_rows(by_blocks, ROWS, block_length=3)
    by_blocks.block_length = None
    with pytest.raises(ValueError, match=r"sampling\.cache=block"):
        fill_rows(model, ROWS, cache="block")


def test_only_the_columns_of_the_kind_are_computed(model, monkeypatch):
    """Prompt 5, two blocks of 4: queries a forward, the left neighbour of the block included."""
    widths = []
    decoder = model.lm.get_decoder()
    watch = lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1])  # noqa: E731
    handle = decoder.register_forward_pre_hook(watch, with_kwargs=True)
    expected = {
        "none": [13] * 4,
        "prefix": [13, 9, 13, 5],
        "dual": [13, 5, 13, 5],
        # what is masked, its left neighbours and what changed: not the same at every step
    }
    for cache, queries in expected.items():
        widths.clear()
        fill_rows(model, [([5, 6, 7, 8, 9], 8)], steps=4, block_length=4, transfer="even", cache=cache)
        assert widths == queries, cache
    handle.remove()


def test_a_cache_needs_an_attention_that_takes_padding(model, monkeypatch):
    monkeypatch.setattr(model, "flash", True)
    with pytest.raises(ValueError, match=r"set model\.attn_implementation=sdpa"):
        fill_rows(model, ROWS, cache="dual")


def test_positions_are_those_of_the_canvas(model):
    """A cached forward of some columns gives the logits of a whole one where nothing else changed."""
    from sampling import CanvasCache

    x = torch.tensor([[5, 6, 7, model.mask_token_id, 9, 10]])
    at = torch.tensor([0]), torch.tensor([3])
    cache, rows = CanvasCache(), torch.tensor([0])
    cache.arrange([None], 6)
    cache.select(rows, None)
    with torch.no_grad():
        whole = model.hidden(x, *unpadded(x), *at, cache)
        cache.select(rows, np.array([[False, False, True, True, False, False]]))
        part = model.hidden(x, *unpadded(x), *at, cache)
        plain = model.hidden(x, *unpadded(x), *at)
    torch.testing.assert_close(whole, plain)
    torch.testing.assert_close(part, plain)
