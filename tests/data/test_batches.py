"""Batches are functions of their step, whatever the layout."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from data import BatchLayout, DataConfig, TokenRows, TrainBatches, ValBatches
from data.batches import mix
from diffllm import DiffusionConfig, MaskedDiffusion
from tests.data.batches import EOS, PLACE, ROWS, batches, by_slot, make_rows, no_noise


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
    assert int(loader[0][0]["batch_size"][0]) == 5


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
        layout.noise = MaskedDiffusion(DiffusionConfig(t_sampler="uniform"), 99, seed=0).corrupt
        times = [float(t) for step in range(2) for batch in layout[step] for t in batch["t"][:, 0]]
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
