"""A loss or gradient that is not finite: nothing is applied, nothing is lost, and the rows can be run again."""

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp

from diffllm.diffusion.loss import masked_loss
from tests.conftest import ROOT
from tests.trainer.runs import losses, metrics, train, weights
from trainer.dcp import SafeReader
from trainer.distributed import init_distributed
from trainer.fsdp_sft_trainer import FSDPSFTTrainer
from trainer.replay import replay

BAD_STEP = 3


@pytest.fixture
def fails(monkeypatch):
    """Make the second micro-batch of a step come out as NaN: in the loss, or in the gradient alone."""

    def configure(kind: str, forwards_a_step: int = 2):
        calls = []

        class Scale(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                return grad * torch.nan

        def failing(hidden, head, *rest):
            calls.append(1)
            if len(calls) != (BAD_STEP - 1) * forwards_a_step + 2:
                return masked_loss(hidden, head, *rest)
            return masked_loss(Scale.apply(hidden) if kind == "gradient" else hidden * torch.nan, head, *rest)

        monkeypatch.setattr("diffllm.modeling_diffllm.masked_loss", failing)

    return configure


def settings(**changes):
    return {"trainer__max_steps": 6, "data__micro_batch_size_per_gpu": 4, **changes}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_raise_names_the_rows_and_loses_nothing(small_run, fails, monkeypatch, kind):
    whole = train(small_run("whole", **settings()))
    with monkeypatch.context():
        fails(kind)
        with pytest.raises(FloatingPointError, match=rf"step {BAD_STEP}: .* not finite.*was not applied") as failure:
            train(small_run(**settings()))
        monkeypatch.undo()
    run = whole.parent / "run"
    [file] = (run / "nonfinite").iterdir()
    assert f"{file}" in str(failure.value)
    with init_distributed() as distributed:
        batches = FSDPSFTTrainer(small_run(**settings()), distributed).source[BAD_STEP - 1]
    samples = [index for batch in batches[0 if kind == "gradient" else 1 :] for index in batch["sample_index"].tolist()]
    assert f"rank 0, samples {samples}: {file}" in str(failure.value)
    assert [line["step"] for line in metrics(run)] == list(range(1, BAD_STEP))

    rows = replay(file)
    assert [row["sample_index"] for row in rows] == samples
    assert all(torch.tensor(row["grad_norm"]).isfinite() for row in rows)  # what made it fail is gone
    if kind == "gradient":
        assert sum(row["loss"] for row in rows) == pytest.approx(losses(whole)[BAD_STEP - 1], rel=1e-5)

    again = train(small_run(**settings()))
    assert losses(again) == losses(whole)
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(whole).items())


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_in_the_first_step_nothing_is_lost_either(small_run, fails, monkeypatch, nonfinite):
    """The checkpoint of step 0 has unchanged moments: the first applied step is Adam's first."""
    config = settings(trainer__nonfinite=nonfinite)
    whole = train(small_run("whole", **config))
    with monkeypatch.context():
        monkeypatch.setattr(f"{__name__}.BAD_STEP", 1)
        fails("loss")
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError, match="step 1: "):
                train(small_run(**config))
        else:
            assert set(adam_steps(train(small_run(**config)))) == {5}
        monkeypatch.undo()
    if nonfinite == "raise":
        again = train(small_run(**config))
        assert losses(again) == losses(whole)
        assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(whole).items())


def adam_steps(run):
    """Adam's step counts in the states of all parameters."""
    directory = run / "checkpoints" / "step_00000006"
    metadata = SafeReader(directory).read_metadata().state_dict_metadata
    steps = {name: torch.tensor(0.0) for name in metadata if name.endswith(".step")}
    dcp.load(steps, storage_reader=SafeReader(directory), no_dist=True)
    return [int(step) for step in steps.values()]


def test_skip_leaves_the_step_out(small_run, fails, capsys):
    fails("loss")
    run = train(small_run(**settings(trainer__nonfinite="skip")))
    assert [line["train/nonfinite_steps"] for line in metrics(run)] == [0, 0, 1, 1, 1, 1]
    assert [loss is None for loss in losses(run)] == [False, False, True, False, False, False]
    assert f"step {BAD_STEP}: the loss or its gradient is not finite" in capsys.readouterr().out
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


def test_too_many_skips_end_the_run(small_run, fails):
    fails("loss")
    with pytest.raises(FloatingPointError, match=r"More than trainer\.max_nonfinite_steps=0"):
        train(small_run(**settings(trainer__nonfinite="skip", trainer__max_nonfinite_steps=0)))


@pytest.mark.slow
def test_replay_from_the_command_line(small_run, fails, tmp_path):
    fails("loss")
    with pytest.raises(FloatingPointError):
        train(small_run(**settings()))
    [file] = (tmp_path / "run" / "nonfinite").iterdir()
    command = [sys.executable, "-m", "trainer.replay"]
    shown = subprocess.run([*command, file], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert shown[0].split() == ["sample_index", "t", "masked", "loss", "largest_nll", "grad_norm"]
    assert len(shown) == 1 + 4 + 1
    failed = subprocess.run([*command, "nowhere.pt"], cwd=ROOT, capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert "error: nowhere.pt: no such file" in failed.stderr
    manifest = tmp_path / "run" / "checkpoints" / f"step_{BAD_STEP - 1:08d}" / "checkpoint.json"
    assert json.loads(manifest.read_text())["step"] == BAD_STEP - 1
    manifest.unlink()
    with pytest.raises(ValueError, match=r"not a checkpoint.*Name another: python -m trainer\.replay .* CHECKPOINT"):
        replay(file)
