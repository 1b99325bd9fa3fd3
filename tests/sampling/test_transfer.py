"""How many tokens are committed, and the canvas around it."""

import torch

from sampling import left_pad, trim
from sampling.canvas import open_canvas
from sampling.transfer import even, share_steps, time_grid


def commits(schedule, n, steps):
    left, counts = torch.tensor([n]), []
    for step in range(steps):
        count = schedule(step, steps, left, torch.tensor([n]))
        counts.append(int(count))
        left = left - count
    assert int(left) == 0
    return counts


def test_even_spreads_the_remainder_over_the_first_steps():
    assert commits(lambda i, s, left, n: even(i, s, n, left), 8, 3) == [3, 3, 2]
    assert commits(lambda i, s, left, n: even(i, s, n, left), 3, 5) == [1, 1, 1, 0, 0]


def test_time_grid_commits_the_share_of_the_time_step():
    counts = commits(lambda i, s, left, n: time_grid(i, s, 1e-3, left), 24, 8)
    assert counts[:2] == [2, 3]  # int(24 · 0.999/8), then int(22 · (0.999/8) / (1 - 0.999/8))
    assert commits(lambda i, s, left, n: time_grid(i, s, 1e-3, left), 7, 1) == [7]


def test_steps_are_shared_out_over_blocks():
    assert share_steps(9, 3) == [3, 3, 3]
    assert share_steps(8, 3) == [3, 3, 2]
    assert share_steps(2, 3) == [1, 1, 1]


def test_canvas_of_ragged_prompts():
    input_ids, attention_mask = left_pad([[5, 6, 7], [8]], pad_token_id=0)
    assert input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    x, attention_mask, position_ids = open_canvas(input_ids, attention_mask, 2, mask_token_id=9)
    assert x.tolist() == [[5, 6, 7, 9, 9], [0, 0, 8, 9, 9]]
    assert attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert position_ids.tolist() == [[0, 1, 2, 3, 4], [1, 1, 0, 1, 2]]


def test_without_padding_there_is_no_mask():
    _, attention_mask, position_ids = open_canvas(torch.tensor([[1]]), torch.tensor([[1]]), 2, 9)
    assert attention_mask is None
    assert position_ids is None


def test_trim_stops_before_the_first_eos():
    assert trim([3, 4, 9, 5, 9], [9]) == [3, 4]
    assert trim([3, 4], [9]) == [3, 4]
