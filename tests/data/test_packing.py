"""Packed rows are the rows alone."""

from math import isfinite
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import DataConfig
from data.packing import first_fit, pack, row_lengths, single_rows
from tests.data.batches import batches
from tests.trainer.runs import losses, metrics, train
from trainer import fsdp_sft_trainer, replay

ROWS = [(3, 4), (9, 7), (2, 3), (5, 6)]  # tokens before and after the noise begins


def ragged_batch(size=16):
    """Left-padded rows whose tokens count from 100·(row + 1)."""
    lengths = torch.tensor([sum(row) for row in ROWS])
    columns = torch.arange(size) - (size - lengths[:, None])
    attended = columns >= 0
    return {
        "input_ids": torch.where(attended, columns + 100 * torch.arange(1, 5)[:, None], 0),
        "attention_mask": attended.long(),
        "position_ids": columns.clamp(min=0),
        "masked": columns >= torch.tensor([row[0] for row in ROWS])[:, None],
        "sample_index": torch.tensor([30, 10, 40, 20]),
    }


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 25))
def test_every_row_is_packed_once_and_fits(lengths, size):
    together = first_fit(lengths, size)
    assert sorted(row for rows in together for row in rows) == list(range(len(lengths)))
    totals = [sum(lengths[row] for row in rows) for rows in together]
    assert all(total <= size or len(rows) == 1 for total, rows in zip(totals, together, strict=True))
    assert sum(total <= size // 2 for total in totals) <= 1  # two such rows would share one


def test_a_packed_batch():
    batch = ragged_batch()
    packed = pack(batch, 18)
    attended = packed["attention_mask"].bool()
    assert [*packed["input_ids"].shape] == [3, 18]
    assert [row[own].unique().tolist() for row, own in zip(packed["packed_row"], attended, strict=True)] == [
        [1],
        [0, 3],
        [2],
    ]
    assert packed["sample_index"].tolist() == [30, 10, 40, 20]
    for row, alone in enumerate(single_rows(packed)):
        own = batch["attention_mask"][row].bool()
        for name in ("input_ids", "position_ids", "masked"):
            assert torch.equal(alone[name][0], batch[name][row, own])
        assert int(alone["sample_index"]) == int(batch["sample_index"][row])
    assert sorted(row_lengths(packed).tolist()) == sorted(row_lengths(batch).tolist()) == [5, 7, 11, 16]


def test_rows_that_do_not_fit_together_stay():
    batch = ragged_batch()
    assert pack(batch, 11) is batch
    assert [int(row["sample_index"]) for row in single_rows(batch)] == [30, 10, 40, 20]


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("loss_norm", ["masked", "maskable", "sequence"])
def test_the_loss_is_that_of_the_rows_unpacked(small_run, attention, loss_norm):
    settings = {"diffusion__loss_norm": loss_norm, "model__attn_implementation": attention, "trainer__max_steps": 8}
    settings |= {"data__perbatch_cutoff_type": "min_pad"}
    plain = train(small_run("plain", **settings))
    packed = train(small_run("packed", data__packing=True, data__max_length=80, **settings))
    assert losses(packed) == pytest.approx(losses(plain), rel=1e-5)
    for line, other in zip(metrics(packed), metrics(plain), strict=True):
        assert line["train/elbo"] == pytest.approx(other["train/elbo"], rel=1e-5)
        assert line["perf/mfu"] * line["perf/step_seconds"] == pytest.approx(
            other["perf/mfu"] * other["perf/step_seconds"], rel=1e-9
        )
        assert line["data/padding_share"] <= other["data/padding_share"]


def test_the_foretold_padding_is_that_of_packed_rows():
    for packing in (False, True):
        [loader] = batches(micro=4, packing=packing, perbatch_cutoff_type="min_pad")
        own = positions = 0
        for step in range(loader.steps_per_epoch):
            for batch in loader[step]:
                packed = pack(batch, 16) if packing else batch
                own += int(batch["row_tokens"].sum())
                positions += packed["input_ids"].numel()
        assert loader.padding_share() == pytest.approx(1 - own / positions)


def test_a_packed_step_that_was_not_finite_is_replayed_row_by_row(small_run, monkeypatch):
    compute = fsdp_sft_trainer.FSDPSFTTrainer.compute_loss

    def broken(self, batch, denominator):
        output = compute(self, batch, denominator)
        return output._replace(loss=output.loss * torch.nan)

    monkeypatch.setattr(fsdp_sft_trainer.FSDPSFTTrainer, "compute_loss", broken)
    config = small_run(data__packing=True, trainer__max_steps=1)
    with pytest.raises(FloatingPointError):
        train(config)
    [file] = (Path(config.trainer.output_dir) / "nonfinite").iterdir()
    rows = replay.replay(file)
    assert len(rows) == config.data.train_batch_size
    assert len({row["sample_index"] for row in rows}) == len(rows)
    assert sum(row["masked"] for row in rows) > 0
    assert all(isfinite(row["loss"]) for row in rows)


def test_pairs_of_a_packed_row():
    """Annealing adds them to the packed batch; a row alone keeps its own."""
    packed = pack(ragged_batch(), 18)
    packed["pairs"] = packed["packed_row"][:, :, None] * 10 + packed["position_ids"][:, None]
    for row, alone in enumerate(single_rows(packed)):
        length = alone["position_ids"].shape[1]
        assert torch.equal(alone["pairs"], (row * 10 + torch.arange(length)).expand(1, length, length))


def test_packing_that_leaves_no_padding_out():
    """Three rows of 5 into two of 10: the second would be half padding."""
    batch = ragged_batch(size=16)
    even = {name: tensor[:3] for name, tensor in batch.items()} | {
        "attention_mask": (torch.arange(16) >= 11).repeat(3, 1)
    }
    even = {name: tensor[:, 11:] if tensor.ndim > 1 else tensor for name, tensor in even.items()}
    assert pack(even, 10) is even


def test_rows_without_a_cutoff_leave_no_room():
    with pytest.raises(ValueError, match=r"data\.packing=true with data\.enable_perbatch_cutoff=false"):
        DataConfig(packing=True, enable_perbatch_cutoff=False)


def test_packing_needs_layers_without_a_window(small_run, monkeypatch):
    monkeypatch.setattr("diffllm.modeling_diffllm.has_window", lambda _: True)
    with pytest.raises(ValueError, match=r"data\.packing=true: some layers .* a window; set it to false"):
        train(small_run(data__packing=True))
