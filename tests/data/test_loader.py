"""Batches are functions of their number, and their cut does not depend on the layout."""

import multiprocessing
import threading
import time
from contextlib import closing

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from data import BatchLayout, DataConfig, TokenRows, TrainBatches, ValBatches
from data.batches import mix
from data.collate import assemble, response_widths
from data.token_rows import SCHEMA
from data.workers import from_workers
from diffllm import DiffusionConfig, ForwardProcess
from tests.conftest import no_longer_than

EOS = 0


def make_rows(prompts, responses, end=EOS):
    """Row i holds 100·i + 1, 100·i + 2, … and the end of sequence."""
    lengths = zip(prompts, responses, strict=True)
    ids = [np.arange(1, p + r + 1, dtype=np.int32) + 100 * i for i, (p, r) in enumerate(lengths)]
    for row in ids:
        row[-1] = end
    return TokenRows.of(ids, prompts, cut=end != EOS)


PLACE = {name: place for place, name in enumerate(SCHEMA.names)}
ROWS = make_rows([3, 5, 2, 4, 6, 3, 2, 5, 4, 3], [4, 2, 6, 3, 5, 1, 8, 2, 7, 4])


def no_noise(batch, epoch, batch_size):
    return {**batch, "epoch": torch.tensor(epoch), "batch_size": torch.tensor(batch_size)}


def batches(ranks=1, micro=4, accumulation=1, rows=ROWS, **settings):
    config = DataConfig(num_workers=0, max_length=16, **settings)
    return [
        TrainBatches(rows, config, BatchLayout(rank, ranks, micro, accumulation), EOS, no_noise, seed=7)
        for rank in range(ranks)
    ]


def by_slot(step, layout):
    """slot → (sample, its attended tokens, its maskable tokens)"""
    rows = {}
    for rank_batches in layout:
        for batch in rank_batches[step]:
            for i, slot in enumerate(batch["slot"].tolist()):
                attended = batch["attention_mask"][i].bool()
                ids, maskable = batch["input_ids"][i], batch["maskable"][i]
                rows[slot] = (int(batch["sample_index"][i]), ids[attended].tolist(), ids[maskable].tolist())
    return rows


@pytest.mark.parametrize(
    "cutoff",
    [
        {"enable_perbatch_cutoff": False},
        {"perbatch_cutoff_type": "min_pad"},
        {"perbatch_cutoff_type": "random"},
        {"perbatch_cutoff_type": "random_with_input_pad"},
        {"perbatch_cutoff_type": "random_with_input_pad", "resp_cutoff_ratio": 0.5},
    ],
    ids=str,
)
def test_every_layout_sees_the_same_rows(cutoff):
    layouts = [(1, 4, 1), (1, 2, 2), (1, 1, 4), (2, 2, 1), (2, 1, 2), (4, 1, 1)]
    for step in range(6):
        first, *others = [by_slot(step, batches(*layout, **cutoff)) for layout in layouts]
        assert sorted(first) == [0, 1, 2, 3]
        assert all(other == first for other in others)


def test_an_epoch_visits_rows_once_and_reshuffles():
    [loader] = batches(micro=5)
    orders = [
        [int(i) for step in steps for batch in loader[step] for i in batch["sample_index"]]
        for steps in ([0, 1], [2, 3])
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1]
    assert [int(loader[step][0]["epoch"]) for step in range(4)] == [0, 0, 1, 1]
    assert int(loader[0][0]["batch_size"]) == 5


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_position_is_one_integer(workers):
    [loader] = batches()
    loader.config.num_workers = workers
    resumed = [batch["input_ids"] for micro_batches in loader.loader(range(3, 6)) for batch in micro_batches]
    for step, ids in zip(range(3, 6), resumed, strict=True):
        assert torch.equal(loader[step][0]["input_ids"], ids)


def test_more_rows_in_a_batch_than_there_are():
    with pytest.raises(ValueError, match=r"data\.train_batch_size=11: more than the 10"):
        batches(micro=11)


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


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_visits_every_row_once_on_equally_many_batches(ranks):
    layouts = [BatchLayout(rank, ranks, 2, 1) for rank in range(ranks)]
    per_rank = [list(ValBatches(ROWS, layout, EOS, no_noise)) for layout in layouts]
    assert len({len(batches) for batches in per_rank}) == 1
    counted = [
        int(sample)
        for batches in per_rank
        for batch in batches
        for sample, maskable in zip(batch["sample_index"], batch["maskable"], strict=True)
        if maskable.any()
    ]
    assert sorted(counted) == list(range(10))
    assert sum(int(batch["maskable"].sum()) for batches in per_rank for batch in batches) == ROWS.response_lengths.sum()


class TestGroupByLength:
    ROWS = make_rows([2] * 64, list(np.random.default_rng(0).permutation(np.arange(2, 14)).tolist() * 6)[:64])

    def plans(self, **settings):
        [train] = batches(micro=8, rows=self.ROWS, **settings)
        return [train.plan(step)[1] for step in range(train.steps_per_epoch)]

    def test_every_row_comes_once_and_like_lengths_together(self):
        spread = {}
        for grouped in (False, True):
            plans = self.plans(group_by_length=grouped)
            assert sorted(np.concatenate(plans)) == list(range(64))
            spread[grouped] = np.mean([np.ptp(self.ROWS.lengths[samples]) for samples in plans])
        assert spread[True] < 0.3 * spread[False]

    def test_neither_batches_nor_rows_in_them_are_sorted(self):
        lengths = np.array([self.ROWS.lengths[samples] for samples in self.plans(group_by_length=True)])
        assert (np.diff(lengths.mean(axis=1)) < 0).any()
        assert (np.diff(lengths, axis=1) < 0).any()

    def test_the_order_is_the_same_on_any_ranks_and_at_any_step(self):
        layouts = [
            by_slot(5, batches(ranks, micro, rows=self.ROWS, group_by_length=True)) for ranks, micro in ((1, 8), (4, 2))
        ]
        assert layouts[0] == layouts[1]


def test_row_tokens_count_neither_padding_nor_what_was_cut():
    batch = assemble(ROWS, np.array([0, 1]), np.array([2, 6]), EOS)
    assert batch["row_tokens"].tolist() == [3 + 2, 5 + 2]


def test_the_fingerprint_tells_rows_apart():
    same, longer, moved = (make_rows([3, 4], lengths) for lengths in ([2, 2], [2, 3], [3, 1]))
    assert same.fingerprint() == make_rows([3, 4], [2, 2]).fingerprint()
    assert len({rows.fingerprint() for rows in (same, longer, moved)}) == 3


def test_the_fingerprint_is_of_the_rows_chosen_and_not_of_where_they_are_kept():
    whole = TokenRows(pa.concat_tables([make_rows([3, 5], [4, 2]).table, make_rows([2], [6]).table]))
    assert whole.select(np.arange(3)).fingerprint() == whole.fingerprint()
    assert whole.select(np.array([0, 1])).fingerprint() == make_rows([3, 5], [4, 2]).fingerprint()
    assert whole.select(np.array([1, 0, 2])).fingerprint() != whole.fingerprint()


class TestMixture:
    """Three rows of the first file, seven of the second."""

    @pytest.fixture
    def layout(self):
        rows = make_rows([3] * 10, [4] * 10)
        table = rows.table.set_column(PLACE["source"], "source", pa.array([0] * 3 + [1] * 7, pa.int32()))
        config = DataConfig(num_workers=0, max_length=16, train_files=["a", "b"], mixture=[4, 1])
        return TrainBatches(TokenRows(table), config, BatchLayout(0, 1, 5, 1), EOS, no_noise, seed=1)

    def test_an_epoch_has_each_file_by_its_weight(self, layout):
        for epoch in range(3):
            samples, repeats = layout.order(epoch)
            counts = np.bincount(samples, minlength=10)
            assert (counts[:3].sum(), counts[3:].sum()) == (8, 2)
            assert set(counts[:3]) == {2, 3}  # every row in turn
            for sample in range(3):
                assert repeats[samples == sample].tolist() == list(range(counts[sample]))

    def test_a_row_that_comes_again_has_other_noise(self, layout):
        layout.noise = ForwardProcess(DiffusionConfig(t_sampler="uniform"), 99, seed=0)
        times = [float(t) for step in range(2) for batch in layout[step] for t in batch["t"]]
        assert len(set(times)) == 10

    def test_a_file_of_which_nothing_is_left(self, layout):
        with pytest.raises(ValueError, match=r"data\.mixture=\[1, 1\]: no row of b\.jsonl is left"):
            mix(np.zeros(4, dtype=int), {"a.jsonl": 1, "b.jsonl": 1}, np.random.default_rng(0))
        with pytest.raises(ValueError, match=r"no row of b\.jsonl is among the 4 of an epoch"):
            mix(np.array([0, 0, 0, 1]), {"a.jsonl": 1000, "b.jsonl": 1}, np.random.default_rng(0))


def test_a_curriculum_goes_from_easy_to_hard():
    rows = make_rows([3] * 10, [4] * 10)
    difficulty = [3.0, 1, 2, 1, 3, 2, 1, 2, 3, 1]
    rows = TokenRows(rows.table.set_column(PLACE["difficulty"], "difficulty", pa.array(difficulty)))
    [train] = batches(micro=4, rows=rows, order="curriculum")
    orders = [train.order(epoch)[0].tolist() for epoch in range(4)]
    for order in orders:
        easy, hard = ([difficulty[sample] for sample in order[start : start + 4]] for start in (0, 4))
        assert len(order) == 8
        assert max(easy) <= min(hard)
    assert len(set(map(tuple, orders))) > 1  # ties in another order
    assert {sample for order in orders for sample in order} == set(range(10))  # none always waits


def test_the_place_in_a_batch_of_a_curriculum_is_drawn():
    """It decides how much of a row is masked: the easiest row must not always have the same share."""
    rows = make_rows([3] * 8, [4] * 8)
    rows = TokenRows(rows.table.set_column(PLACE["difficulty"], "difficulty", pa.array([float(i) for i in range(8)])))
    [train] = batches(micro=4, rows=rows, order="curriculum")
    places = {train.order(epoch)[0].tolist().index(0) for epoch in range(40)}
    assert places == {0, 1, 2, 3}  # four draws in forty miss one in 25,000 runs


def test_context_in_a_response_is_not_trained_on():
    rows = make_rows([3, 2], [6, 4])
    table = rows.table.set_column(PLACE["context"], "context", pa.array([[5, 7], None], pa.list_(pa.int32())))
    batch = assemble(TokenRows(table), np.array([0, 1]), np.array([6, 7]), EOS)
    assert batch["maskable"].astype(int).tolist() == [[0, 0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("cutoff", ["min_pad", "random", "random_with_input_pad"])
def test_the_padding_foretold_is_the_padding_that_comes(cutoff):
    layout = batches(ranks=2, micro=2, perbatch_cutoff_type=cutoff)
    made = [batch for rank in layout for step in range(layout[0].steps_per_epoch) for batch in rank[step]]
    own = sum(int(batch["row_tokens"].sum()) for batch in made)
    positions = sum(batch["input_ids"].numel() for batch in made)
    assert layout[0].padding_share() == pytest.approx(1 - own / positions)


def test_padding_is_foretold_of_the_whole_epoch():
    """The first batches of a curriculum are unlike the others."""
    lengths = np.repeat([1, 2, 4, 8], 200) + np.arange(800) % 2
    rows = make_rows(np.full(800, 2), lengths)
    rows = TokenRows(rows.table.set_column(PLACE["difficulty"], "difficulty", pa.array(lengths // 2 * 1.0)))
    train = batches(1, 8, rows=rows, order="curriculum", perbatch_cutoff_type="min_pad")[0]
    assert train.padding_share(50) == pytest.approx(train.padding_share(100), rel=0.05)


class Stuck(Dataset):
    """Its second item takes for ever, in a way that leaves a thread behind."""

    def __getitem__(self, item):
        if item:
            threading.Thread(target=time.sleep, args=(1000,)).start()
            time.sleep(1000)
        return item


def test_workers_end_with_the_iteration_whatever_they_do():
    before = set(multiprocessing.active_children())
    with no_longer_than(5), closing(from_workers(Stuck(), 2, range(9), pack=int)) as items:
        assert next(items) == 0
        workers = set(multiprocessing.active_children()) - before
        assert len(workers) == 2
    assert not any(worker.is_alive() for worker in workers)
