"""Resuming is exact, and a checkpoint is whole or not there."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.staging import DefaultStager

from data.storage import UNFINISHED
from tests.conftest import ROOT
from tests.trainer.runs import change_manifest, losses, metrics, newest, train, weights
from trainer.checkpoint import Checkpoints, load_weights
from trainer.dcp import DigestingWriter, SafeReader
from trainer.distributed import init_distributed
from trainer.export import export
from trainer.fsdp_sft_trainer import FSDPSFTTrainer
from trainer.manifest import MANIFEST


def assert_bitwise(run, other):
    assert losses(run) == losses(other)
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(run).items())


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_killed_run_goes_on_as_if_nothing_had_happened(small_run, tmp_path):
    """SIGKILL in the middle of a real run, then the same command again."""
    whole = train(small_run("whole", trainer__max_steps=40))
    config = small_run("killed", trainer__max_steps=40, trainer__save_checkpoint_steps=5)
    overrides = [
        "trainer.max_steps=40", "trainer.save_checkpoint_steps=5", f"trainer.output_dir={config.trainer.output_dir}",
        "data.max_length=64", "data.train_batch_size=8", "data.num_workers=0", "optim.lr=1e-3", "trainer.logger=[]",
        *(f"model.{name}={value}" for name, value in asdict(config.model).items() if value is not None),
        *(f"data.{name}={getattr(config.data, name)}" for name in ("train_files", "val_files", "cache_dir")),
    ]  # fmt: skip
    command = [sys.executable, ROOT / "train.py", *overrides]
    process = subprocess.Popen(command, cwd=tmp_path)
    metrics_file = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics_file.is_file() or metrics_file.read_text().count("\n") < 12:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "hf").exists()

    resumed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "resumed from" in resumed.stdout
    assert_bitwise(whole, tmp_path / "killed")
    assert [line["step"] for line in metrics(tmp_path / "killed")] == list(range(1, 41))


def test_save_and_load_restore_the_optimizer_exactly(small_run):
    whole = train(small_run("whole", trainer__save_checkpoint_steps=6))
    shutil.copytree(whole, whole.parent / "copy")
    shutil.rmtree(whole.parent / "copy" / "checkpoints" / "step_00000012")
    assert_bitwise(whole, train(small_run("copy", trainer__save_checkpoint_steps=6)))


def test_old_checkpoints_are_deleted(small_run):
    run = train(small_run(trainer__save_checkpoint_steps=3, trainer__keep_checkpoints=2))
    assert checkpoints(run) == ["step_00000009", "step_00000012"]


def test_broken_checkpoints_do_not_count_as_kept(small_run):
    settings = {"trainer__save_checkpoint_steps": 3, "trainer__keep_checkpoints": 2}
    run = train(small_run(**settings))
    for name in ("step_00000009", "step_00000012"):
        (run / "checkpoints" / name / ".metadata").unlink()
    train(small_run(**settings, trainer__max_steps=6, trainer__resume="never"))
    assert newest(run).name == "step_00000006"


def test_auto_takes_the_newest_whole_one_and_says_what_it_skipped(small_run, capsys):
    settings = {"trainer__save_checkpoint_steps": 3, "trainer__keep_checkpoints": 9}
    run = train(small_run(**settings))
    directory = run / "checkpoints"
    (directory / "step_00000012" / MANIFEST).unlink()
    data = next((directory / "step_00000009").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    (directory / "step_00000006").rename(directory / f"step_00000006{UNFINISHED}")
    assert newest(run) == directory / "step_00000003"
    capsys.readouterr()
    train(small_run(**settings))
    said = capsys.readouterr().out
    assert "step_00000012: not a checkpoint" in said
    assert f"step_00000009: half-written, {data.name} is missing or cut short" in said
    assert f"step_00000006{UNFINISHED}: half-written, the run stopped while saving it" in said
    assert "resumed from" in said


def test_resume_from_a_path(small_run):
    first = train(small_run("first", trainer__save_checkpoint_steps=6))
    path = first / "checkpoints" / "step_00000006"
    assert losses(train(small_run("second", trainer__resume=str(path)))) == losses(first)[6:]
    with pytest.raises(ValueError, match=r"trainer\.resume=.*nowhere: no such checkpoint directory"):
        train(small_run("third", trainer__resume=str(first / "nowhere")))
    (path / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"half-written, \.metadata is missing"):
        train(small_run("fourth", trainer__resume=str(path)))


def test_a_path_does_not_branch_off_inside_a_run(small_run):
    """Later checkpoints of the first branch would be newer than those of the second."""
    run = train(small_run(trainer__save_checkpoint_steps=6))
    with pytest.raises(ValueError, match=r"holds the checkpoints of a run: give another trainer\.experiment_name"):
        train(small_run(trainer__resume=str(run / "checkpoints" / "step_00000006")))


def test_a_longer_run_has_its_own_lr_from_the_first_step(small_run, finished_run):
    whole = train(small_run("whole", trainer__max_steps=20))
    lrs = [line["train/lr"] for line in metrics(train(small_run(trainer__max_steps=20)))]
    assert lrs[12:] == [line["train/lr"] for line in metrics(whole)][12:]


def test_skipped_steps_are_remembered(small_run, monkeypatch):
    monkeypatch.setattr("diffllm.diffusion.masked.MaskedDiffusion.time", lambda *_: 0.0)
    train(small_run(trainer__max_steps=2))
    assert metrics(train(small_run(trainer__max_steps=3)))[-1]["train/skipped_steps"] == 3


def test_a_random_state_of_another_device_is_left_out(small_run, finished_run, monkeypatch):
    """A run that goes from CPU to GPU asks for a state that was never saved."""
    shutil.rmtree(finished_run / "hf")
    other = {"cpu": torch.get_rng_state(), "xpu": torch.ones(3)}
    monkeypatch.setattr("trainer.checkpoint._rng_state", lambda device: other)
    assert (train(small_run()) / "hf").is_dir()


def test_never_does_not_write_over_a_run(small_run, finished_run):
    with pytest.raises(ValueError, match=r"trainer\.resume=never, but .*holds the checkpoints of a run"):
        train(small_run(trainer__resume="never"))


def test_another_run_is_not_resumed(small_run, finished_run):
    with pytest.raises(ValueError, match=r"other settings: optim\.lr was 0\.001 and is 0\.5"):
        train(small_run(optim__lr=0.5))
    with pytest.raises(ValueError, match="global_batch_size was 8 and is 4"):
        train(small_run(data__train_batch_size=4))


def test_other_data_of_the_same_name(small_run, tmp_path):
    file = tmp_path / "rows.jsonl"

    def write(answers):
        rows = ({"question": f"What is {n}?", "answer": f"<think>n</think>{answer}"} for n, answer in answers)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    config = {"data__train_files": [str(file)], "trainer__max_steps": 2}
    write([(n, n) for n in range(16)])
    train(small_run(**config))
    write([(n, n + 1) for n in range(16)])
    with pytest.raises(ValueError, match=r"other settings: training_tokens was \w+ and is \w+"):
        train(small_run(**config))
    write([(n, n) for n in range(17)])
    with pytest.raises(ValueError, match=r"training_rows was 16 and is 17; training_tokens"):
        train(small_run(**config))


def test_a_checkpoint_of_a_newer_version(small_run, finished_run):
    checkpoint = finished_run / "checkpoints" / "step_00000012"
    change_manifest(checkpoint, lambda saved: saved["versions"].update(diffllm="99.1"))
    with pytest.raises(ValueError, match=r"step_00000012 was written by diffllm 99\.1, this is .*: update"):
        train(small_run())


def test_a_checkpoint_on_a_failing_disk_is_not_called_corrupt(small_run, finished_run, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("trainer.dcp.SafeReader.read_data", fail)
    with pytest.raises(OSError, match=r"step_00000012 could not be read .*Input/output error"):
        train(small_run(trainer__max_steps=13))


def test_a_setting_that_an_older_version_did_not_have(small_run, finished_run):
    checkpoint = finished_run / "checkpoints" / "step_00000012"
    change_manifest(checkpoint, lambda saved: saved["config"]["data"].pop("group_by_length"))
    train(small_run())
    with pytest.raises(ValueError, match=r"data\.group_by_length was False and is True"):
        train(small_run(data__group_by_length=True))


def test_a_save_waits_for_the_one_before(small_run, monkeypatch):
    """Every step saves: each finds the one before whole and visible, and none is lost."""
    begun = []
    save = Checkpoints.save

    def recording(self, step, manifest):
        save(self, step, manifest)
        begun.append((step, [path.name for path in self.directory.glob("step_*[0-9]")]))

    monkeypatch.setattr(Checkpoints, "save", recording)
    run = train(small_run(trainer__save_checkpoint_steps=1, trainer__keep_checkpoints=20))
    assert all(f"step_{step - 1:08d}" in visible for step, visible in begun[1:])
    assert checkpoints(run) == [f"step_{step:08d}" for step in range(1, 13)]


def test_what_is_saved_is_the_state_of_the_step(small_run):
    """Training continues while a copy is written."""
    blocking = train(small_run("blocking", trainer__save_checkpoint_steps=3, trainer__async_checkpoints=False))
    asynchronous = train(small_run("asynchronous", trainer__save_checkpoint_steps=3, trainer__keep_checkpoints=9))
    for step in ("step_00000009", "step_00000012"):
        ours, theirs = ((run / "checkpoints" / step) for run in (asynchronous, blocking))
        assert tensors_of(ours).keys() == tensors_of(theirs).keys()
        assert all(torch.equal(tensor, tensors_of(theirs)[name]) for name, tensor in tensors_of(ours).items())


def test_a_stager_that_serves_once(small_run, monkeypatch):
    """As before torch 2.13."""
    stage = DefaultStager._stage

    def once(self, *arguments, **settings):
        staged = stage(self, *arguments, **settings)
        self._state_dict_stager._deepcopy_dispatch.clear()
        return staged

    monkeypatch.setattr(DefaultStager, "_stage", once)
    monkeypatch.setattr("trainer.checkpoint.STAGER_IS_SPENT", True)
    run = train(small_run(trainer__save_checkpoint_steps=3, trainer__keep_checkpoints=9))
    assert checkpoints(run) == [f"step_{step:08d}" for step in (3, 6, 9, 12)]


def tensors_of(directory):
    metadata = SafeReader(directory).read_metadata().state_dict_metadata
    names = [name.removeprefix("model.") for name in metadata if name.startswith("model.")]
    model = {name: torch.empty(metadata[f"model.{name}"].size) for name in names}
    load_weights(directory, model)
    return model


def test_a_checkpoint_of_another_shape(small_run, finished_run):
    checkpoint = finished_run / "checkpoints" / "step_00000012"
    change_manifest(checkpoint, lambda saved: saved["config"]["model"].update(hidden_size=16))
    with pytest.raises(ValueError, match=r"another shape: lm\.lm_head\.weight was \(1256, 32\) and is \(1256, 16\)"):
        train(small_run(model__hidden_size=16))


def test_a_full_disk_leaves_the_previous_checkpoint(small_run):
    """A limit on the size of files stands in for the disk: the write itself fails."""
    run = train(small_run(trainer__max_steps=3))
    before = checkpoints(run)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"step_00000006 could not be written: the disk is full.*step_00000003"):
            train(small_run(trainer__max_steps=6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert checkpoints(run) == before
    assert newest(run).name == "step_00000003"
    assert metrics(train(small_run(trainer__max_steps=6)))[-1]["step"] == 6


def test_a_finished_run_only_exports_again(small_run, finished_run):
    kept = weights(finished_run)
    shutil.rmtree(finished_run / "hf")
    again = train(small_run())
    assert len(metrics(again)) == 12
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in kept.items())


def test_a_checkpoint_that_is_being_written_survives_an_error(small_run, monkeypatch):
    """An error in the step after a save does not stop the save."""

    def failing(self, step, *rest):
        if step == 5:
            raise RuntimeError("out of luck")
        return train_step(self, step, *rest)

    train_step = FSDPSFTTrainer.train_step
    monkeypatch.setattr(FSDPSFTTrainer, "train_step", failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(small_run("run", trainer__save_checkpoint_steps=4))
    assert checkpoints(Path(small_run("run").trainer.output_dir)) == ["step_00000004"]


def test_a_save_that_failed_ends_the_run_at_the_next_step(small_run, monkeypatch):
    monkeypatch.setattr(Checkpoints, "_publish", lambda self: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match=r"step_00000004 could not be written: no space left"):
        train(small_run(trainer__save_checkpoint_steps=4))
    assert 4 <= len(metrics(Path(small_run().trainer.output_dir))) < 12


def test_a_corrupt_checkpoint_is_not_exported(finished_run, tmp_path):
    step = finished_run / "checkpoints" / "step_00000012"
    for shard in step.glob("*.distcp"):
        shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"step_00000012: __0_0\.distcp is damaged"):
        export(step, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_export_of_a_checkpoint_is_the_model_of_the_run(default_run, tmp_path):
    export(default_run / "checkpoints" / "step_00000012", tmp_path / "exported")
    for file in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "exported" / file).read_bytes() == (default_run / "hf" / file).read_bytes()
    with pytest.raises(ValueError, match="nowhere: no such checkpoint directory"):
        export(tmp_path / "nowhere", tmp_path / "other")
    with pytest.raises(ValueError, match="exported exists: delete it, or name another directory"):
        export(default_run / "checkpoints" / "step_00000012", tmp_path / "exported")


@pytest.mark.parametrize("staged", [True, False])
def test_a_copy_is_written_without_a_wait_for_the_gpu(tmp_path, monkeypatch, staged):
    """After every 10 MB torch would wait, although the copy is in the host's memory."""
    stream, waits = Mock(device_type="cuda"), []
    stream.synchronize = lambda: waits.append(1)
    with init_distributed():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(filesystem, "_get_available_device_type", lambda: "cuda")
        state = {name: torch.zeros(1800, 1800) for name in ("a", "b")}
        dcp.save(state, storage_writer=DigestingWriter(tmp_path, staged), process_group=dist.new_group(backend="gloo"))
        monkeypatch.undo()
    assert bool(waits) is not staged


def test_a_copy_that_the_host_has_no_memory_for(small_run, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Registering memory failed with cudaError 2\nand more")

    monkeypatch.setattr(DefaultStager, "_stage", refuse)
    with pytest.raises(MemoryError, match=r"\(Registering memory failed .*\): set trainer\.async_checkpoints=false"):
        train(small_run(trainer__save_checkpoint_steps=3))
