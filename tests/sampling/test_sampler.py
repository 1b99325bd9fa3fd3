"""The loop, on a model made up for the purpose: its logits at a position depend on the row's own tokens only."""

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sampling import Canvas, RowState, Sampler, SamplingConfig, fill, left_pad, sample
from sampling.batch import RowBatch
from sampling.policies import ADAPTIVE, ALGS, SCHEDULED
from tests.sampling.models import EOS, MASK, PAD, SPECIAL, MockDenoiser, V, unpadded


def run(prompts, names=None, special=SPECIAL, **changes):
    config = SamplingConfig(**{"max_new_tokens": 8, "steps": 5, "stop_at_eos": False, **changes})
    input_ids, attention_mask = left_pad(prompts, PAD)
    return sample(MockDenoiser(), input_ids, config, special, attention_mask, row_ids=names, history=True)


def fill_rows(rows, config, special=SPECIAL, **kwargs):
    """Filled rows by name, of (prompt, new tokens) pairs."""
    canvases = [Canvas.after(prompt, new, MASK, name) for name, (prompt, new) in enumerate(rows)]
    filled = {row.canvas.row_id: row for row in fill(MockDenoiser(), canvases, config, special, history=True, **kwargs)}
    return [filled[name] for name in range(len(rows))]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 8) | st.just(MASK), max_size=6), st.integers(1, 12)), min_size=2, max_size=5
    ),
    batch_size=st.integers(1, 5),
    steps=st.integers(1, 14),
    block_length=st.none() | st.integers(1, 12),
    alg=st.sampled_from([*ALGS]),
    transfer=st.sampled_from([*SCHEDULED, *ADAPTIVE]),
    threshold=st.sampled_from([0.1, 0.3, 0.6]),
    factor=st.sampled_from([0.5, 2.0]),
    entropy_bound=st.sampled_from([0.5, 5.0]),
    temperature=st.sampled_from([0.0, 0.7]),
    top_p=st.sampled_from([None, 0.8]),
    top_k=st.sampled_from([None, 1, 3]),
    confidence=st.sampled_from(["unscaled", "scaled"]),
    alg_temp=st.sampled_from([0.0, 0.5]),
    remask=st.sampled_from([0.0, 0.5]),
    cfg_scale=st.sampled_from([0.0, 1.0]),
    stop_at_eos=st.booleans(),
    stop=st.sampled_from([(), ((3,), (4, 5))]),
    eos_penalty=st.sampled_from([0.0, 2.0]),
    eos_confidence=st.sampled_from(["keep", "suppress"]),
    min_new_tokens=st.sampled_from([0, 1]),
)
def test_a_row_does_not_depend_on_its_batch(rows, stop, **changes):
    """Tokens, history and forwards of a row are those of the row alone, for every policy, also as rows come and go."""
    if changes["transfer"] in ADAPTIVE:
        changes["remask"] = 0.0
    config, special = SamplingConfig(**changes), replace(SPECIAL, stop=stop)
    for name, together in enumerate(fill_rows(rows, config, special)):
        prompt, new = rows[name]
        canvas = Canvas.after(prompt, new, MASK, name)
        [alone] = fill(MockDenoiser(), [canvas], config, special, history=True)
        assert together.tokens == alone.tokens
        assert together.nfe == alone.nfe
        np.testing.assert_array_equal(together.history, alone.history)
        assert MASK not in together.tokens
        given = [token for token in prompt if token != MASK]
        assert [token for token, before in zip(together.tokens, prompt, strict=False) if before != MASK] == given


def test_the_seed_decides_every_draw():
    first = run([[1, 2], [1, 2]], temperature=1.0, seed=1).sequences
    assert torch.equal(first, run([[1, 2], [1, 2]], temperature=1.0, seed=1).sequences)
    assert not torch.equal(first, run([[1, 2], [1, 2]], temperature=1.0, seed=2).sequences)
    assert not torch.equal(first[0], first[1])


def test_steps_that_commit_nothing_need_no_forward():
    output = run([[1, 2]], steps=500)
    canvases = [[1, 2] + [MASK] * 8] + [canvas[0].tolist() for canvas in output.history]
    changes = sum(before != after for before, after in pairwise(canvases))
    assert output.nfe == [changes]
    assert changes <= 8
    assert len(output.history) == 500


def test_a_canvas_without_masks_comes_back_as_it_is():
    canvases = [Canvas([1, 2, 3], 1, 0), Canvas.after([1], 2, MASK, 1)]
    done = {row.canvas.row_id: row for row in fill(MockDenoiser(), canvases, SamplingConfig(steps=2), SPECIAL)}
    assert (done[0].tokens, done[0].nfe, done[0].new_tokens) == ([1, 2, 3], 0, 0)
    assert MASK not in done[1].tokens


@pytest.mark.parametrize(("batch_size", "lower"), [(2, "sampling.batch_size"), (1, "sampling.max_new_tokens")])
def test_out_of_memory_names_what_to_lower(batch_size, lower):
    class Full(MockDenoiser):
        def hidden(self, *_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore on this")

    config = SamplingConfig(max_new_tokens=4, steps=4, batch_size=batch_size)
    words = rf"^out of memory with {batch_size}×6 tokens; lower {lower} \(CUDA out of memory\. .* 2 GiB\.\)$"
    with pytest.raises(MemoryError, match=words):
        sample(Full(), torch.ones(2, 2).long(), config, SPECIAL)


def test_rows_leave_and_enter_the_batch():
    """A row that needs one forward does not wait for one that needs eight."""
    model, config = MockDenoiser(), SamplingConfig(batch_size=2, steps=8, transfer="even", stop_at_eos=False)
    canvases = [Canvas.after([1], new, MASK, name) for name, new in enumerate([8, 1, 1, 1])]
    assert [row.canvas.row_id for row in fill(model, canvases, config, SPECIAL)] == [1, 2, 3, 0]
    assert model.calls == 8


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_canvases_are_added_and_dropped_between_steps(cache):
    config = SamplingConfig(steps=4, batch_size=3, stop_at_eos=False, temperature=0.7, cache=cache)
    canvases = [Canvas.after([1, number], 6 + number, MASK, number) for number in range(4)]
    alone = {each.row_id: next(fill(MockDenoiser(), [each], config, SPECIAL)) for each in canvases}
    sampler, filled, steps = Sampler(MockDenoiser(), config, SPECIAL), [], []
    sampler.add(canvases[0])
    sampler.add(canvases[1], lambda event: steps.append(event.step))
    sampler.step()
    sampler.add(replace(canvases[1]))  # another canvas with the same number
    assert (len(sampler), sampler.free) == (3, 0)
    sampler.drop(canvases[0])
    sampler.add(canvases[2])
    sampler.drop(canvases[3])  # was never added
    while len(sampler):
        filled += sampler.step()
    assert sorted((row.canvas.row_id, row.tokens, row.nfe) for row in filled) == sorted(
        (name, alone[name].tokens, alone[name].nfe) for name in (1, 1, 2)
    )
    assert steps == [0, 1, 2, 3]
    assert sampler.step() == []


def test_canvases_of_a_batch_have_seeds_of_their_own():
    config, canvas = SamplingConfig(steps=4, stop_at_eos=False, temperature=0.7), Canvas.after([1], 8, MASK)
    sampler, filled = Sampler(MockDenoiser(), config, SPECIAL), []
    for seed in (None, 5, 6):
        sampler.add(canvas, seed=seed)
    while len(sampler):
        filled += sampler.step()
    alone = [next(fill(MockDenoiser(), [canvas], replace(config, seed=seed), SPECIAL)) for seed in (0, 5, 6)]
    assert [row.tokens for row in filled] == [row.tokens for row in alone]
    assert len({tuple(row.tokens) for row in filled}) == 3


def test_a_row_ends_when_nothing_is_masked_before_its_eos():
    """And keeps the tokens that it would have had."""
    for row in range(40):
        whole, stopped = (run([[row % 9, row // 9]], stop_at_eos=stop, steps=8) for stop in (False, True))
        tokens = whole.sequences[0, 2:].tolist()
        end = tokens.index(EOS) + 1 if EOS in tokens else 8
        assert stopped.sequences[0, 2:].tolist() == tokens[:end] + [EOS] * (8 - end)
        last = next(i for i, canvas in enumerate(whole.history) if MASK not in canvas[0, : 2 + end])
        assert len(stopped.history) == min(last + 1, 8)
        assert stopped.tokens_per_forward == [end / stopped.nfe[0]]


def test_a_row_ends_at_a_stop_sequence():
    whole = run([[1, 2]]).sequences[0, 2:].tolist()
    stopped = run([[1, 2]], special=replace(SPECIAL, stop=(tuple(whole[2:4]),))).sequences[0, 2:].tolist()
    assert stopped == whole[:4] + [EOS] * 4


def test_a_criterion_sees_each_clean_token_once_from_left_to_right():
    seen = []

    def criterion(tokens):
        seen.append(len(tokens))
        return len(tokens) == 5

    [row] = fill_rows([([1, 2], 8)], SamplingConfig(steps=3, stop_at_eos=False), criterion=criterion)
    assert seen == [3, 4, 5]
    assert row.tokens[5:] == [EOS] * 5


def test_eos_can_be_put_off_and_penalised():
    prompts = [[a, b] for a in range(9) for b in range(9)]
    free = run(prompts).sequences[:, 2:]
    assert (free[:, :4] == EOS).any()
    late = run(prompts, min_new_tokens=4).sequences[:, 2:]
    assert not (late[:, :4] == EOS).any()
    assert (late[:, 4:] == EOS).any()
    assert not (run(prompts, eos_penalty=20.0).sequences == EOS).any()


def hasty_steps(config):
    """Steps that committed a proposed end and left another proposal masked, over rows with many ends."""
    special = replace(SPECIAL, eos=(EOS, 0, 1, 2, 3))
    batch, hasty = RowBatch(MockDenoiser(), config, special), 0
    for prompt in range(12):
        row = RowState(Canvas.after([4 + prompt % 5, prompt // 5], 8, MASK), config, special)
        batch.set_rows([row])
        while row.step is not None:
            columns, [proposal] = row.masked(row.step.end), batch.propose()
            row.commit(*proposal)
            ends, left = np.isin(proposal[0], special.eos), ~np.isin(columns, row.committed)
            hasty += (ends & ~left).any() and (~ends & left).any()
            assert len(row.committed)
            row.advance()
        assert MASK not in row.tokens
    return hasty


@pytest.mark.parametrize("transfer", [*SCHEDULED, *ADAPTIVE])
@pytest.mark.parametrize("alg", ALGS)
@pytest.mark.parametrize("block_length", [None, 4])
def test_suppressed_ends_are_committed_after_all_other_tokens_of_their_block(alg, transfer, block_length):
    bounds = {"threshold": 0.6, "factor": 1.0, "entropy_bound": 0.5}
    config = SamplingConfig(
        steps=8, alg=alg, transfer=transfer, block_length=block_length, stop_at_eos=False, alg_temp=0.5, **bounds
    )
    assert hasty_steps(config)
    assert not hasty_steps(replace(config, eos_confidence="suppress"))


@pytest.mark.parametrize(("confidence", "committed"), [("keep", [1, 3]), ("suppress", [3])])
def test_an_adaptive_transfer_commits_suppressed_ends_when_nothing_else_is_left(confidence, committed):
    config = SamplingConfig(transfer="threshold", threshold=0.9, eos_confidence=confidence, stop_at_eos=False)
    row = RowState(Canvas([5, *[MASK] * 3], 1), config, SPECIAL)
    row.commit(np.array([EOS, EOS, 4]), *np.array([[0.95, 0.5, 0.9]] * 3))
    assert row.committed.tolist() == committed
    assert row.tokens[3] == 4
    row.advance()
    ends = row.masked()
    row.commit(np.full(len(ends), EOS), *np.array([[0.95, 0.5][-len(ends) :]] * 3))
    assert row.committed.tolist() == ends[:1].tolist()


def test_forbidden_tokens_are_never_committed():
    prompts = [[a] for a in range(9)]
    assert (run(prompts).sequences[:, 1:] == 3).any()
    assert not (run(prompts, special=replace(SPECIAL, forbidden=(3,))).sequences[:, 1:] == 3).any()


def test_a_logits_processor_sees_canvases_and_candidates():
    shapes = []

    def only_three(tokens, scores):
        shapes.append((tuple(tokens.shape), tuple(scores.shape)))
        return torch.full_like(scores, -torch.inf).index_fill_(-1, torch.tensor(3), 0.0)

    config = SamplingConfig(steps=2, transfer="even")
    [row] = fill_rows([([1, 2], 4)], config, logits_processor=only_three)
    assert row.tokens == [1, 2, 3, 3, 3, 3]
    assert shapes == [((4, 6), (4, V)), ((2, 6), (2, V))]


def test_a_hook_sees_every_step_with_full_logits():
    seen = []

    def tokens_hook(step, x, logits):
        seen.append((step, None if logits is None else tuple(logits.shape)))
        return x

    config = SamplingConfig(max_new_tokens=4, steps=9)
    sample(MockDenoiser(), torch.tensor([[1, 2]]), config, SPECIAL, tokens_hook=tokens_hook)
    assert seen == [(None, None)] + [(step, (1, 6, V)) for step in range(9)]


def test_hooks_change_logits_and_tokens():
    def only_three(step, x, logits):
        return torch.full_like(logits, -torch.inf).index_fill_(-1, torch.tensor(3), 0.0)

    def last_is_seven(step, x, logits):
        x[:, -1] = 7
        return x

    config = SamplingConfig(max_new_tokens=4, steps=2)
    hooks = {"tokens_hook": last_is_seven, "logits_hook": only_three}
    output = sample(MockDenoiser(), torch.tensor([[1, 2]]), config, SPECIAL, **hooks)
    assert output.sequences.tolist() == [[1, 2, 3, 3, 3, 7]]


def test_what_hooks_are_given_is_what_happens_without_them():
    prompts = [[1, 2], [3, 4, 5]]
    input_ids, attention_mask = left_pad(prompts, PAD)
    config = SamplingConfig(max_new_tokens=8, steps=5, temperature=0.5, stop_at_eos=False)
    hooked = sample(
        MockDenoiser(), input_ids, config, SPECIAL, attention_mask, history=True, logits_hook=lambda step, x, y: y
    )
    plain = run(prompts, temperature=0.5)
    assert torch.equal(torch.stack(hooked.history), torch.stack(plain.history))


@pytest.mark.parametrize("hook", ["tokens_hook", "logits_hook"])
def test_a_hook_that_changes_the_shape(hook):
    config = SamplingConfig(max_new_tokens=4)
    changes = {hook: lambda step, x, logits: x[:, :-1]}
    with pytest.raises(ValueError, match=f"{hook} gave back shape"):
        sample(MockDenoiser(), torch.tensor([[1, 2]]), config, SPECIAL, **changes)


def test_the_first_call_of_a_hook_may_change_the_canvas():
    """Steps are planned for what it gives back, as in the published code."""

    def mask_all(step, x, logits):
        return torch.full_like(x, MASK) if step is None else x

    config = SamplingConfig(max_new_tokens=4, steps=1)
    output = sample(MockDenoiser(), torch.tensor([[1, 2, 3]]), config, SPECIAL, tokens_hook=mask_all)
    assert not (output.sequences == MASK).any()


def test_a_hook_that_fills_a_row_alone_is_refused():
    def fill_first(step, x, logits):
        return torch.where(torch.arange(len(x))[:, None] == 0, 5, x) if step is None else x

    config = SamplingConfig(max_new_tokens=4, steps=2)
    with pytest.raises(ValueError, match="equally many steps"):
        sample(MockDenoiser(), torch.tensor([[1, 2], [3, 4]]), config, SPECIAL, tokens_hook=fill_first)


def test_hooks_go_without_what_they_would_hide():
    with pytest.raises(ValueError, match="hook go without"):
        sample(
            MockDenoiser(), torch.tensor([[1]]), SamplingConfig(), SPECIAL, tokens_hook=lambda step, x, logits: x,
            criterion=lambda tokens: True,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"sampling\.cache=dual: hooks see all logits"):
        sample(
            MockDenoiser(), torch.tensor([[1]]), SamplingConfig(cache="dual"), SPECIAL,
            tokens_hook=lambda step, x, logits: x,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"sampling\.transfer=factor: hooks need one of linear"):
        sample(
            MockDenoiser(), torch.tensor([[1]]), SamplingConfig(transfer="factor"), SPECIAL,
            tokens_hook=lambda step, x, logits: x,
        )  # fmt: skip


def test_blocks_are_filled_from_left_to_right():
    history = run([[1, 2]], max_new_tokens=6, steps=6, block_length=2, transfer="even").history
    for step, canvas in enumerate(history):
        filled = (canvas[0, 2:] != MASK).nonzero().squeeze(-1)
        assert filled.max() < 2 * (step // 2 + 1)


def test_the_last_block_is_shorter_when_the_length_does_not_divide():
    history = run([[1, 2]], max_new_tokens=5, steps=3, block_length=2).history
    assert [int((canvas == MASK).sum()) for canvas in history] == [3, 1, 0]


@pytest.mark.parametrize("alg_temp", [0.0, 1.0])
def test_left_to_right(alg_temp):
    settings = {"transfer": "even", "alg": "left_to_right", "alg_temp": alg_temp}
    history = run([[1, 2]], max_new_tokens=4, steps=4, **settings).history
    assert [(canvas[0] == MASK).nonzero().squeeze(-1).tolist() for canvas in history] == [[3, 4, 5], [4, 5], [5], []]


def test_remasking_keeps_the_schedule_and_changes_tokens_that_were_committed():
    kept = [canvas[0] for canvas in run([[1, 2]], steps=16, max_new_tokens=16, transfer="even").history]
    changed = [canvas[0] for canvas in run([[1, 2]], steps=16, max_new_tokens=16, transfer="even", remask=0.5).history]
    assert [int((x == MASK).sum()) for x in changed] == [int((x == MASK).sum()) for x in kept] == [*range(15, -1, -1)]
    forgotten = [int(((before != MASK) & (after == MASK)).sum()) for before, after in pairwise(changed)]
    # σ·committed with σ = min(½, (steps - step - 1)/step), rounded down, and no more than stay masked
    expected = [min(int(min(0.5, (15 - step) / step) * step), 15 - step) for step in range(1, 15)] + [0]
    assert forgotten == expected
    assert not any(((before != MASK) & (after == MASK)).any() for before, after in pairwise(kept))


@pytest.mark.parametrize("changes", [{"remask": 0.5, "transfer": "even"}, {"alg": "maskgit_plus", "cfg_scale": 0.5}])
def test_events_tell_a_canvas_from_the_one_before(changes):
    events, config = [], SamplingConfig(steps=8, max_new_tokens=16, stop_at_eos=False, **changes)
    canvases = [Canvas.after([1] * (row + 1), 16, MASK, row) for row in range(3)]
    rows = list(fill(MockDenoiser(), canvases, config, SPECIAL, on_step=events.append))
    for row in rows:
        tokens, last = np.array(row.canvas.tokens), None
        for last in (event for event in events if event.row_id == row.canvas.row_id):
            assert (tokens[last.committed] == MASK).all()
            assert (tokens[last.remasked] != MASK).all()
            tokens[last.committed], tokens[last.remasked] = last.tokens[last.committed], MASK
            np.testing.assert_array_equal(last.tokens, tokens)
            np.testing.assert_array_equal(last.masked, tokens == MASK)
            assert ((last.probs > 0) & (last.probs <= 1)).all()
            assert (last.entropies is None) == (config.alg != "entropy")
        assert last.tokens.tolist() == row.tokens
        assert (last.nfe, last.prompt_length) == (row.nfe, row.canvas.prompt_length)
    assert any(len(event.remasked) for event in events) == bool(config.remask)


def test_with_remasking_a_response_ends_where_its_last_canvas_says():
    for prompt in range(60):
        row = [[prompt % 9, prompt // 9]]
        whole, stopped = (
            run(row, steps=8, remask=0.5, stop_at_eos=stop).sequences[0].tolist() for stop in (False, True)
        )
        end = whole.index(EOS, 2) + 1 if EOS in whole[2:] else 10
        assert stopped == whole[:end] + [EOS] * (10 - end)


def test_parts_of_the_logits_give_what_all_at_once_give(monkeypatch):
    settings = {"temperature": 0.7, "top_p": 0.9, "cfg_scale": 0.5, "min_new_tokens": 3, "alg_temp": 0.3}
    prompts = [[1, 2], [3, 4, 5], [6]]
    whole = run(prompts, **settings)
    monkeypatch.setattr("sampling.batch.positions_at_once", lambda model: 5)
    monkeypatch.setattr("sampling.batch.RATED_AT_ONCE", 2 * V)
    parts = run(prompts, **settings)
    assert torch.equal(torch.stack(parts.history), torch.stack(whole.history))


def test_guidance_pulls_away_from_what_the_model_says_without_the_prompt():
    """l_u + (1 + w)·(l - l_u) at one position, by hand; it costs two forwards."""
    model, prompt = MockDenoiser(), torch.tensor([[1, 2, MASK]])
    at = torch.tensor([0]), torch.tensor([2])
    with_prompt = model.hidden(prompt, *unpadded(prompt), *at)
    without = model.hidden(torch.full_like(prompt, MASK), *unpadded(prompt), *at)
    expected = (without + 3 * (with_prompt - without)).argmax().item()
    output = run([[1, 2]], max_new_tokens=1, cfg_scale=2.0)
    assert output.sequences[0, -1].item() == expected
    assert output.nfe == [2]


def test_scaled_confidence_loses_the_order_near_temperature_zero_and_unscaled_keeps_it():
    """At a tiny temperature all scaled confidences tie at 1, the model's own do not."""
    greedy = run([[1, 2]], alg="maskgit_plus", steps=8, transfer="even")
    cold = {"alg": "maskgit_plus", "steps": 8, "transfer": "even", "temperature": 1e-4}
    assert torch.equal(torch.stack(run([[1, 2]], **cold).history), torch.stack(greedy.history))
    scaled = run([[1, 2]], **cold, confidence="scaled")
    assert not torch.equal(torch.stack(scaled.history), torch.stack(greedy.history))


def test_padding_to_the_right_of_tokens_is_refused():
    with pytest.raises(ValueError, match="left"):
        sample(MockDenoiser(), torch.tensor([[1, 2]]), SamplingConfig(), SPECIAL, torch.tensor([[1, 0]]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("cfg_scale", float("nan")), ("eos_penalty", float("inf")), ("alg_temp", 1e-320), ("temperature", 1e-7),
     ("steps", 10**30),
     ("alg", "entropi"), ("steps", 0), ("max_new_tokens", 0), ("top_p", 1.5), ("top_p", 0.0), ("temperature", -1.0),
     ("eps", 0.0), ("block_length", 0), ("transfer", "quadratic"), ("confidence", "both"), ("top_k", 0),
     ("threshold", 0.0), ("threshold", 1.1), ("factor", 0.0), ("entropy_bound", -1.0), ("cfg_scale", -0.5),
     ("cache", "all"), ("eos_confidence", "low"), ("cache_refresh", 0),
     ("remask", 1.0), ("min_new_tokens", -1), ("min_new_tokens", 257)],
)  # fmt: skip
def test_settings_outside_their_range_are_named(field, value):
    with pytest.raises(ValueError, match=rf"sampling\.{field}={re.escape(str(value))}"):
        SamplingConfig(**{field: value})


def test_remasking_needs_a_schedule():
    with pytest.raises(ValueError, match=r"sampling\.remask=0\.1: goes with a scheduled transfer"):
        SamplingConfig(remask=0.1, transfer="threshold")


def test_names_of_llada():
    assert SamplingConfig(alg="low_confidence").alg == "maskgit_plus"
    assert SamplingConfig(alg="random").alg == "origin"


def test_blocks_without_masks_take_no_steps():
    """Twelve given tokens after the masks are three blocks more, and the steps belong to the masks."""
    config = SamplingConfig(steps=4, block_length=4, transfer="even", stop_at_eos=False)
    [row] = fill(MockDenoiser(), [Canvas([1, *[MASK] * 4, *[2] * 12], 1)], config, SPECIAL)
    assert row.nfe == 4


def test_what_was_given_after_an_end_stays():
    config = SamplingConfig(steps=8, stop_at_eos=True)
    for prompt in range(60):
        [row] = fill(MockDenoiser(), [Canvas([prompt % 9, prompt // 9, *[MASK] * 6, 5, 6], 2)], config, SPECIAL)
        assert row.tokens[-2:] == [5, 6]
        end = row.tokens.index(EOS, 2) + 1 if EOS in row.tokens[2:] else 10
        assert row.new_tokens == min(end, 8) - 2
        assert row.response == row.tokens[2 : end - (row.tokens[end - 1] == EOS)]
