"""Rows are cut and padded alike on every rank."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from data import DataConfig, TokenRows
from data.collate import assemble, response_widths
from tests.data.batches import EOS, PLACE, ROWS, make_rows


def widths(prompts, responses, seed=0, **settings):
    config = DataConfig(max_length=20, **settings)
    return response_widths(np.array(prompts), np.array(responses), config, np.random.default_rng(seed))


def test_min_pad_ends_at_the_longest_row():
    assert widths([3, 5], [4, 6], perbatch_cutoff_type="min_pad").tolist() == [8, 6]


def test_without_cutoff_rows_end_at_max_length():
    assert widths([3, 5], [4, 6], enable_perbatch_cutoff=False).tolist() == [17, 15]


def test_random_ends_all_rows_at_the_length_of_one():
    seen = {tuple(widths([3, 5], [4, 6], seed, perbatch_cutoff_type="random")) for seed in range(20)}
    assert seen == {(4, 2), (8, 6)}


def test_random_with_input_pad_gives_all_rows_one_response_length():
    seen = {tuple(widths([3, 5], [4, 6], seed)) for seed in range(20)}
    assert seen == {(4, 4), (6, 6)}


@given(st.integers(0, 10_000), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_random_tail_leaves_every_row_something(seed, responses):
    prompts = [2] * len(responses)
    cut = widths(prompts, responses, seed, perbatch_cutoff_type="min_pad", resp_cutoff_ratio=1.0)
    whole = widths(prompts, responses, seed, perbatch_cutoff_type="min_pad")
    assert cut.min() >= 1
    assert (whole - cut == (whole - cut)[0]).all()
    assert (whole - cut)[0] >= 1 or whole.min() == 1


def test_assembled_rows_are_cut_padded_and_marked():
    rows = make_rows([3, 2], [2, 4])
    batch = assemble(rows, np.array([0, 1]), np.array([3, 3]), EOS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, EOS, EOS], [EOS, 101, 102, 103, 104, 105]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [0] + [1] * 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [1, 0, 1, 2, 3, 4]]
    assert batch["maskable"].tolist() == [[False] * 3 + [True] * 3] * 2


def test_no_row_exceeds_max_length():
    prompts = [15, 2]
    for seed in range(9):
        totals = widths(prompts, [5, 18], seed) + prompts
        assert totals.max() <= 20


def test_the_end_of_a_response_that_was_cut_is_not_taught():
    was_cut = make_rows([2], [3], end=7)
    for tokens, taught in ((was_cut, 3), (make_rows([2], [3]), 5)):
        batch = assemble(tokens, np.array([0]), np.array([5]), EOS)
        assert batch["input_ids"].shape == (1, 7)
        assert batch["maskable"].sum() == taught


def test_a_cut_can_fall_into_the_prompt():
    batch = assemble(make_rows([5], [2]), np.array([0]), np.array([-2]), EOS)
    assert batch["input_ids"].tolist() == [[1, 2, 3]]
    assert not batch["maskable"].any()


def test_row_tokens_count_neither_padding_nor_what_was_cut():
    batch = assemble(ROWS, np.array([0, 1]), np.array([2, 6]), EOS)
    assert batch["row_tokens"].tolist() == [3 + 2, 5 + 2]


def test_context_in_a_response_is_not_trained_on():
    rows = make_rows([3, 2], [6, 4])
    table = rows.table.set_column(PLACE["context"], "context", pa.array([[5, 7], None], pa.list_(pa.int32())))
    batch = assemble(TokenRows(table), np.array([0, 1]), np.array([6, 7]), EOS)
    assert batch["maskable"].astype(int).tolist() == [[0, 0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1]]
