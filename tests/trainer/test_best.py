"""The best validation: kept, exported, and the end of a run that no longer improves."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffllm import DiffusionConfig
from diffllm.diffusion import build_objective
from tests.trainer.runs import metrics, train, weights
from trainer.checkpoint import Checkpoints
from trainer.export import export
from trainer.fsdp_sft_trainer import FSDPSFTTrainer
from trainer.progress import Clock, Progress
from trainer.summary import conclude


@pytest.fixture
def validated(monkeypatch):
    """Replaces the values of val/elbo, in the order of the validations."""

    def replace(values):
        measured = iter(values)
        monkeypatch.setattr(FSDPSFTTrainer, "validate", lambda self: {"val/elbo": next(measured), "val/other": 0.0})

    return replace


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_best_checkpoint_is_kept_and_exported(small_run, validated, tmp_path, capsys):
    validated([3.0, 1.0, float("nan"), 2.0])
    settings = {"trainer__val_check_interval": 3, "trainer__keep_checkpoints": 1}
    run = train(small_run(trainer__keep_best=True, **settings))
    assert checkpoints(run) == ["step_00000006", "step_00000012"]
    export(run / "checkpoints" / "step_00000006", tmp_path / "exported")
    best = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in weights(run).items())
    printed = capsys.readouterr().out
    assert "val/elbo: 2 at the end, lowest 1 at step 6" in printed
    assert f"model of step_00000006: {run / 'hf'}" in printed

    validated([3.0, 1.0, 2.0, 2.0])
    last = train(small_run("last", **settings))
    assert checkpoints(last) == ["step_00000012"]
    assert any(not torch.equal(best[name], tensor) for name, tensor in weights(last).items())


def test_a_run_that_ends_without_a_number_has_diverged(small_run, validated):
    validated([1.0, float("nan")])
    with pytest.raises(FloatingPointError, match=r"val/elbo is not finite at the end.*optim\.lr"):
        train(small_run("diverged", trainer__val_check_interval=6))
    validated([1.0, float("nan")])
    run = train(small_run("kept", trainer__val_check_interval=6, trainer__keep_best=True))
    assert (run / "hf").exists()
    assert not (run.parent / "diverged" / "hf").exists()


def test_a_resumed_run_knows_the_best(small_run, validated):
    settings = {"trainer__val_check_interval": 3, "trainer__keep_checkpoints": 1, "trainer__keep_best": True}
    validated([1.0, 2.0])
    train(small_run(trainer__max_steps=6, **settings))
    validated([3.0, 4.0])
    run = train(small_run(**settings))
    assert checkpoints(run) == ["step_00000003", "step_00000012"]


def test_patience_ends_the_run_and_stays_spent(small_run, validated, capsys):
    validated([3.0, 2.0, 2.5, 2.0])
    settings = {"trainer__val_check_interval": 2, "trainer__patience": 2}
    run = train(small_run(**settings))
    assert [line["step"] for line in metrics(run)] == [*range(1, 9)]
    assert checkpoints(run) == ["step_00000008"]
    assert "trainer.patience=2" in capsys.readouterr().out
    validated([])
    assert len(metrics(train(small_run(**settings)))) == 8


@pytest.mark.parametrize("name", ["keep_best", "patience"])
def test_without_validation_there_is_no_best(small_run, name):
    changes = {f"trainer__{name}": 1, "trainer__val_check_interval": 2}
    with pytest.raises(ValueError, match=rf"trainer\.{name}.*data\.val_split"):
        train(small_run(data__val_files=[], **changes))


def test_a_run_may_leave_nothing_but_metrics(small_run):
    run = train(small_run(trainer__save_model=False, trainer__save_checkpoints=False, trainer__save_checkpoint_steps=3))
    assert not (run / "hf").exists()
    assert not (run / "checkpoints").exists()
    assert len(metrics(run)) == 12


@pytest.mark.parametrize(
    ("source_dtype", "setting", "written"),
    [("float32", "auto", "float32"), ("bfloat16", "auto", "bfloat16"), ("bfloat16", "f32", "float32")],
)
def test_the_export_has_the_dtype_of_its_source(
    small_run, small_model, tokenizer, tmp_path, source_dtype, setting, written
):
    dtype = getattr(torch, source_dtype)
    rounded = {name: tensor.to(dtype) for name, tensor in small_model.state_dict().items()}
    small_model.save_pretrained(tmp_path / "source", rounded, tokenizer)
    run = train(small_run(model__path=str(tmp_path / "source"), trainer__export_dtype=setting, trainer__max_steps=1))
    assert {str(tensor.dtype) for tensor in weights(run).values()} == {f"torch.{written}"}
    assert json.loads((run / "hf" / "config.json").read_text())["dtype"] == written


def test_a_longer_run_says_what_becomes_of_the_learning_rate(small_run, capsys):
    train(small_run(trainer__max_steps=4))
    run = train(small_run(trainer__max_steps=8))
    printed = capsys.readouterr().out
    assert "planned for 4 steps, now 8: optim.lr_schedule=cosine" in printed
    assert f"the next step has lr {metrics(run)[4]['train/lr']:.3g} where 0 was planned" in printed


def test_judging_a_validation():
    progress = Progress()
    assert not progress.judge(1, {})
    assert progress.judge(2, {"val/elbo": 2.0, "val/other": 0.0})
    assert not progress.judge(4, {"val/elbo": float("inf")})
    assert (progress.metric, progress.value, progress.best, progress.best_step) == ("val/elbo", None, 2.0, 2)
    assert progress.not_better == 1
    assert progress.judge(6, {"val/elbo": 1.0})
    assert progress.not_better == 0


def test_time_left_is_estimated_once_without_the_first_step():
    clock = Clock()
    clock.add(100.0, 10)
    lines = []
    for _ in range(12):
        clock.add(2.0, 10)
        lines.append(clock.estimate(30))
    assert [line for line in lines if line] == ["2.00 s a step: 60.0 s for the 30 steps left, without validation"]
    assert clock.tokens == 130


def test_a_finished_run_names_the_next_command(small_run):
    config = small_run()
    lines = conclude(config, Progress(), Clock(steps=3, tokens=1234.0), None)
    assert lines[0].endswith("for 3 steps and 1,234 tokens")
    assert lines[-1].startswith(f"next: python sample.py model.path={config.trainer.output_dir}/hf ")


def test_a_best_step_of_another_directory_is_not_considered(small_run, validated, capsys):
    settings = {"trainer__val_check_interval": 3, "trainer__keep_best": True}
    validated([1.0, 2.0])
    first = train(small_run(trainer__max_steps=6, **settings))
    validated([4.0, 3.0])
    last = first / "checkpoints" / "step_00000006"
    second = train(small_run("second", trainer__resume=str(last), **settings))
    assert "step 3 was the best, but no longer counts" in capsys.readouterr().out
    assert checkpoints(second) == ["step_00000009", "step_00000012"]


def test_the_best_checkpoint_lives_until_a_better_one_is_whole(small_run, validated, monkeypatch, tmp_path):
    """A run that dies while it writes the new best one resumes with the old one."""
    settings = {"trainer__val_check_interval": 3, "trainer__keep_checkpoints": 1, "trainer__keep_best": True}
    validated([3.0, 4.0, 2.0])
    save, saved = Checkpoints.save, []

    def dies(self, step, manifest):
        saved.append(step)
        if step == 9:
            self.wait()
            raise OSError("killed")
        save(self, step, manifest)

    monkeypatch.setattr(Checkpoints, "save", dies)
    with pytest.raises(OSError, match="killed"):
        train(small_run(trainer__save_checkpoint_steps=2, **settings))
    assert saved[-1] == 9
    assert checkpoints(tmp_path / "run") == ["step_00000003", "step_00000008"]
    monkeypatch.undo()
    validated([2.5, 2.0])
    run = train(small_run(**settings))
    assert "step_00000012" in checkpoints(run)
    assert metrics(run)[-1]["val/elbo"] == 2.0


@pytest.mark.slow
def test_two_ranks_agree_on_the_best_and_on_patience(small_run, train_on_two_ranks):
    """With so high a learning rate validation soon gets worse."""
    settings = {"trainer__val_check_interval": 1, "trainer__keep_best": True, "trainer__patience": 2, "optim__lr": 1.0}
    train_on_two_ranks([small_run("two", **settings)])
    run = train(small_run("one", **settings))
    both = [run, run.parent / "two"]
    elbo = [[line["val/elbo"] for line in metrics(each)] for each in both]
    assert elbo[1] == pytest.approx(elbo[0], rel=1e-3)
    assert checkpoints(both[0]) == checkpoints(both[1])
    best = min(range(len(elbo[0])), key=elbo[0].__getitem__) + 1
    assert f"step_{best:08d}" in checkpoints(run)
    assert len(elbo[0]) == best + 2 < 12


def test_a_damaged_best_checkpoint_does_not_count(small_run, validated, capsys):
    settings = {"trainer__val_check_interval": 3, "trainer__keep_checkpoints": 1, "trainer__keep_best": True}
    validated([1.0, 2.0])
    run = train(small_run(trainer__max_steps=6, **settings))
    [file] = (run / "checkpoints" / "step_00000003").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    validated([4.0, 3.0])
    train(small_run(**settings))
    assert "step 3 was the best, but no longer counts" in capsys.readouterr().out
    assert checkpoints(run) == ["step_00000012"]


def test_other_validation_rows_have_a_best_of_their_own(small_run, equations, capsys):
    settings = {"trainer__val_check_interval": 3, "trainer__keep_best": True}
    train(small_run(trainer__max_steps=6, **settings))
    run = train(small_run(data__val_files=equations.train_files, **settings))
    assert "the validation rows are others now" in capsys.readouterr().out
    elbo = {line["step"]: line["val/elbo"] for line in metrics(run) if "val/elbo" in line}
    assert f"step_{min((9, 12), key=elbo.get):08d}" in checkpoints(run)


def test_a_validation_that_measured_nothing_is_not_the_best(small_run):
    sums = [0.0, 5.0, 0.0, *[0.0] * 8]
    progress = Progress()
    assert not progress.judge(1, build_objective(DiffusionConfig(), 0, 0).metrics(sums))
    assert not progress.diverged


def test_other_rows_are_remembered_although_none_was_best(small_run, validated, equations, monkeypatch):
    """A run whose last validation is not finite has no best; later ones belong to the new rows."""
    settings = {"trainer__val_check_interval": 3, "trainer__keep_best": True, "data__val_files": equations.train_files}
    validated([float("nan")])
    with pytest.raises(FloatingPointError):
        train(small_run(trainer__max_steps=3, **settings | {"data__val_files": equations.val_files}))
    validated([1.0])
    train(small_run(trainer__max_steps=6, **settings))
    validated([2.0, 3.0])
    run = train(small_run(**settings))
    assert "step_00000006" in checkpoints(run)


def test_a_diverged_end_replaces_no_checkpoint(small_run, validated):
    settings = {"trainer__keep_checkpoints": 1, "trainer__save_checkpoint_steps": 3, "trainer__max_steps": 6}
    validated([float("nan")])
    config = small_run(**settings)
    for _ in range(2):  # also when no step is left
        with pytest.raises(FloatingPointError):
            train(config)
    assert checkpoints(Path(config.trainer.output_dir)) == ["step_00000003", "step_00000006"]
