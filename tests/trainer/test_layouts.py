"""One optimizer step is a function of parameters and rows, whatever the layout."""

import json
import shutil

import pytest
import torch

from tests.conftest import GOLDEN
from tests.trainer.runs import losses, metrics, train, weights


def assert_same_run(run, other):
    assert losses(run) == pytest.approx(losses(other), rel=1e-6)
    # All weights together: a key bias has no true gradient, and Adam blows its rounding up.
    ours, theirs = (torch.cat([tensor.flatten() for tensor in weights(path).values()]) for path in (run, other))
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


SLOW_NORMS = [pytest.param(norm, marks=pytest.mark.slow) for norm in ("maskable", "sequence")]


@pytest.mark.parametrize("loss_norm", ["masked", *SLOW_NORMS])
def test_micro_batches_change_nothing(small_run, loss_norm):
    """50 steps as 1, 2, 4 and 8 micro-batches."""
    settings = {"diffusion__loss_norm": loss_norm, "trainer__max_steps": 50, "data__resp_cutoff_ratio": 0.3}
    whole = train(small_run("whole", **settings))
    assert len(losses(whole)) == 50
    for micro in (4, 2, 1):
        assert_same_run(whole, train(small_run(f"micro{micro}", data__micro_batch_size_per_gpu=micro, **settings)))


def test_workers_change_not_a_bit(small_run):
    settings = {"trainer__max_steps": 50, "data__group_by_length": True}
    plain = train(small_run("plain", **settings))
    for workers in (1, 2):
        other = train(small_run(f"workers{workers}", data__num_workers=workers, **settings))
        assert losses(other) == losses(plain)
        assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(plain).items())


def test_ranks_change_nothing_and_checkpoints_move_between_them(small_run, train_on_two_ranks):
    """Two ranks in several layouts equal one rank; one rank resumes a run of two."""
    settings = {"data__resp_cutoff_ratio": 0.5, "trainer__val_check_interval": 15, "trainer__max_steps": 30}
    alone = train(small_run("alone", **settings))
    half = {"trainer__save_checkpoint_steps": 15, **settings}
    on_two = [
        small_run("two", **settings),
        small_run("accumulating", data__micro_batch_size_per_gpu=2, data__num_workers=1, **settings),
        small_run("recomputing", model__enable_gradient_checkpointing=True, **settings),
        small_run("gathered", trainer__reshard_after_forward=False, **settings),
        small_run(
            "reducing-once", data__micro_batch_size_per_gpu=1, trainer__reduce_each_micro_batch=False, **settings
        ),
        small_run("moved", **half),
    ]
    train_on_two_ranks(on_two)
    for config in on_two:
        assert_same_run(alone, path := alone.parent / config.trainer.output_dir.rsplit("/")[-1])
        for ours, theirs in zip(metrics(alone), metrics(path), strict=True):
            for name in (key for key in ours if key.startswith(("val/", "train/nll", "train/elbo"))):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name

    moved = alone.parent / "moved"
    shutil.rmtree(moved / "checkpoints" / "step_00000030")
    assert_same_run(alone, train(small_run("moved", **half)))


def test_a_step_with_no_masked_token_is_skipped_and_counted(small_run, monkeypatch):
    monkeypatch.setattr("diffllm.diffusion.masked.MaskedDiffusion.time", lambda *_: 0.0)
    config = small_run("empty", trainer__max_steps=3)
    run = train(config)
    assert [line["train/skipped_steps"] for line in metrics(run)] == [1, 2, 3]
    assert losses(run) == [0, 0, 0]


def test_the_loss_curve_is_the_golden_one(small_run):
    """30 steps, which a refactor keeps. A change that is meant to change them puts the new ones into the file."""
    settings = {"trainer__max_steps": 30, "data__train_batch_size": 32, "data__micro_batch_size_per_gpu": 8}
    settings |= {"data__train_files": [], "data__val_files": [], "diffusion__time_reweighting": "cart"}
    run = train(small_run("curve", optim__lr=5e-3, **settings))
    golden = json.loads((GOLDEN / "loss_curve.json").read_text())
    assert losses(run) == pytest.approx(golden, rel=1e-5)
    assert golden[-1] < 0.7 * golden[0]
