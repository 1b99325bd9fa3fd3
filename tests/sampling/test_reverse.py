"""The loop on a model made up for the purpose: its logits at a position depend on the row's own tokens only."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sampling import SamplingConfig, left_pad, sample
from sampling.reverse import plan_steps

V, MASK, PAD = 11, 10, 9


class MockDenoiser:
    """Logits from a hash of the row's attended tokens and the position counted from the right; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x_t, attention_mask, position_ids, where=None):
        self.calls += 1
        attended = torch.ones_like(x_t) if attention_mask is None else attention_mask
        L = x_t.shape[1]
        from_right = torch.arange(L, 0, -1)
        state = ((x_t + 1) * attended * from_right).sum(-1)  # [B]
        seed = state[:, None, None] * 31 + from_right[None, :, None] * 17 + torch.arange(V) * 7
        logits = torch.sin(seed.double()).float() * 4
        logits[..., MASK] = -torch.inf
        return logits if where is None else logits[where]


def run(prompts, rows=None, **changes):
    config = SamplingConfig(**{"max_new_tokens": 8, "steps": 5, **changes})
    input_ids, attention_mask = left_pad(prompts, PAD)
    denoise = MockDenoiser()
    output = sample(denoise, input_ids, config, MASK, attention_mask, rows=rows, output_history=True)
    assert output.nfe == denoise.calls
    return output


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6), min_size=2, max_size=4),
    max_new_tokens=st.integers(1, 12),
    steps=st.integers(1, 14),
    block_length=st.none() | st.integers(1, 12),
    alg=st.sampled_from(["origin", "maskgit_plus", "topk_margin", "entropy"]),
    transfer=st.sampled_from(["time_grid", "even"]),
    temperature=st.sampled_from([0.0, 0.7]),
    alg_temp=st.sampled_from([0.0, 0.5]),
)
def test_a_row_does_not_depend_on_its_batch(prompts, **changes):
    together = run(prompts, **changes)
    assert not (together.sequences == MASK).any()
    for row, prompt in enumerate(prompts):
        alone = run([prompt], rows=[row], **changes)
        width = alone.sequences.shape[1]
        assert torch.equal(alone.sequences[0], together.sequences[row, -width:])
        for a, b in zip(alone.history, together.history, strict=True):
            assert torch.equal(a[0], b[row, -width:])


def test_the_seed_decides_every_draw():
    first = run([[1, 2], [1, 2]], temperature=1.0, seed=1).sequences
    assert torch.equal(first, run([[1, 2], [1, 2]], temperature=1.0, seed=1).sequences)
    assert not torch.equal(first, run([[1, 2], [1, 2]], temperature=1.0, seed=2).sequences)
    assert not torch.equal(first[0], first[1])


def test_steps_that_commit_nothing_need_no_forward():
    output = run([[1, 2]], steps=500)
    canvases = [[1, 2] + [MASK] * 8] + [canvas[0].tolist() for canvas in output.history]
    changes = sum(before != after for before, after in pairwise(canvases))
    assert output.nfe == changes <= 8
    assert len(output.history) == 500


def test_a_hook_sees_every_step_with_full_logits():
    seen = []

    def tokens_hook(step, x, logits):
        seen.append((step, None if logits is None else tuple(logits.shape)))
        return x

    input_ids, _ = left_pad([[1, 2]], PAD)
    config = SamplingConfig(max_new_tokens=4, steps=9)
    sample(MockDenoiser(), input_ids, config, MASK, tokens_hook=tokens_hook)
    assert seen == [(None, None)] + [(step, (1, 6, V)) for step in range(9)]


def test_hooks_change_logits_and_tokens():
    def only_three(step, x, logits):
        return torch.full_like(logits, -torch.inf).index_fill_(-1, torch.tensor(3), 0.0)

    def last_is_seven(step, x, logits):
        x[:, -1] = 7
        return x

    input_ids, _ = left_pad([[1, 2]], PAD)
    output = sample(
        MockDenoiser(), input_ids, SamplingConfig(max_new_tokens=4, steps=2), MASK, None, None, False, last_is_seven,
        only_three,
    )  # fmt: skip
    assert output.sequences.tolist() == [[1, 2, 3, 3, 3, 7]]


def test_masks_inside_the_prompt_are_filled():
    output = run([[1, MASK, 2]], block_length=2)
    assert not (output.sequences == MASK).any()
    assert output.sequences[0, [0, 2]].tolist() == [1, 2]


def test_blocks_are_filled_from_left_to_right():
    history = run([[1, 2]], max_new_tokens=6, steps=6, block_length=2, transfer="even").history
    for step, canvas in enumerate(history):
        filled = (canvas[0, 2:] != MASK).nonzero().squeeze(-1)
        assert filled.max() < 2 * (step // 2 + 1)


def test_the_last_block_is_shorter_when_the_length_does_not_divide():
    config = SamplingConfig(max_new_tokens=5, steps=3, block_length=2)
    opened = [int(in_block.sum()) for _, in_block, position, _ in plan_steps(7, config) if position == 0]
    assert opened == [4, 6, 7]


def test_scaled_confidence_loses_the_order_near_temperature_zero_and_unscaled_keeps_it():
    """At a tiny temperature all scaled confidences tie at 1, the model's own do not."""
    greedy = run([[1, 2]], alg="maskgit_plus", steps=8, transfer="even")
    cold = {"alg": "maskgit_plus", "steps": 8, "transfer": "even", "temperature": 1e-4}
    assert torch.equal(torch.stack(run([[1, 2]], **cold).history), torch.stack(greedy.history))
    scaled = run([[1, 2]], **cold, confidence="scaled")
    assert not torch.equal(torch.stack(scaled.history), torch.stack(greedy.history))


def test_padding_to_the_right_of_tokens_is_refused():
    with pytest.raises(ValueError, match="left"):
        sample(MockDenoiser(), torch.tensor([[1, 2]]), SamplingConfig(), MASK, torch.tensor([[1, 0]]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("alg", "entropi"), ("steps", 0), ("max_new_tokens", 0), ("top_p", 1.5), ("top_p", 0.0), ("temperature", -1.0),
     ("eps", 0.0), ("block_length", 0), ("transfer", "cosine"), ("confidence", "both"), ("top_k", 0)],
)  # fmt: skip
def test_settings_outside_their_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"sampling.{field}={value}"):
        SamplingConfig(**{field: value})
