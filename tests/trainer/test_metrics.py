"""Metrics of every step, and their meaning."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trainer
from tests.trainer.runs import metrics, train
from trainer.distributed import Distributed
from trainer.speed import Speed

EVERY_STEP = {
    "train/loss", "train/elbo", "train/perplexity_bound", "train/masked_accuracy", "train/grad_norm", "train/lr",
    "train/epoch", "train/skipped_steps", "train/nonfinite_steps", "perf/tokens_per_second", "perf/step_seconds",
    "perf/mfu", "perf/data_wait", "perf/memory_gib", "data/padding_share", "data/masked_share",
}  # fmt: skip
NLL = {f"nll_t_{low:g}_{low + 0.25:g}" for low in (0, 0.25, 0.5, 0.75)}


def test_every_metric_at_every_step(small_run):
    lines = metrics(train(small_run(trainer__val_check_interval=6)))
    for line in lines:
        assert set(line) >= EVERY_STEP
        assert 0 <= line["perf/data_wait"] < 1
        assert 0 < line["perf/mfu"] < 1
        assert 0 <= line["data/padding_share"] < 1
    assert set().union(*lines) >= {f"train/{name}" for name in NLL}  # a step may mask no token of a bucket
    assert [{f"val/{name}" for name in NLL} < set(line) for line in lines] == [False] * 5 + [True] + [False] * 5 + [
        True
    ]


def test_with_1_over_t_weights_the_loss_is_the_bound(default_run):
    for line in metrics(default_run):
        assert line["train/loss"] == pytest.approx(line["train/elbo"], rel=1e-5)


def test_grouping_by_length_leaves_less_padding(small_run):
    shares = {}
    for grouped in (False, True):
        config = small_run(f"{grouped}", data__group_by_length=grouped, data__perbatch_cutoff_type="min_pad")
        lines = metrics(train(config))
        shares[grouped] = sum(line["data/padding_share"] for line in lines) / len(lines)
    assert shares[True] < 0.85 * shares[False]


def test_model_flops_are_those_of_the_products(small_model):
    """6 a weight and token, the head on masked tokens only, and 12·L²·D a layer for attention."""
    speed = Speed(small_model, Distributed(0, 1, torch.device("cpu")), torch.float32, peak_tflops=1e-12)
    counts = {"row_tokens": 20, "computed": 20, "pairs": 200, "in_loss": 5}
    weights = sum(parameter.numel() for parameter in small_model.lm.get_decoder().layers.parameters())
    head = small_model.lm.lm_head.weight.numel()
    found = speed.metrics(counts, seconds=2.0, waited=0.5)
    assert found["perf/mfu"] == (6 * weights * 20 + 6 * head * 5 + 12 * 32 * 2 * 200) / 2
    assert (found["perf/tokens_per_second"], found["perf/data_wait"]) == (10, 0.25)
    speed = Speed(small_model, Distributed(0, 1, torch.device("cpu")), torch.bfloat16, peak_tflops=None)
    assert "perf/mfu" not in speed.metrics(counts, seconds=2.0, waited=0.5)  # no data sheet knows a CPU


def test_tensorboard_has_every_metric_and_no_step_twice(small_run):
    settings = {"trainer__logger": ["tensorboard"], "trainer__val_check_interval": 3}
    train(small_run(trainer__max_steps=3, **settings))
    run = train(small_run(trainer__max_steps=6, **settings))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = metrics(run)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("val/elbo")] == [3, 6]
    assert set(events.Tags()["scalars"]) == set().union(*lines) - {"step"}
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([line["train/loss"] for line in lines])


def test_training_from_python(small_run):
    """The defaults of the dataclasses, with their interpolations, and the checks of the command line."""
    config = small_run(trainer__output_dir="${trainer.experiment_name}/x", trainer__max_steps=1)
    config.trainer.experiment_name = str(small_run().trainer.output_dir)
    run = trainer.train(config)
    assert run == Path(config.trainer.experiment_name) / "x"
    assert len(metrics(run)) == 1
    config.optim.lr = -1
    with pytest.raises(ValueError, match=r"optim\.lr"):
        trainer.train(config)
