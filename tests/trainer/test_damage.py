"""Checkpoints that are damaged, or that a stranger has made; links, deleted directories and broken files."""

import json
import os
import pickle
import random
import shutil

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from data.storage import digest_file
from tests.data.test_storage import files_up_to
from tests.trainer.runs import change_manifest, losses, metrics, newest, train, weights
from trainer.export import export
from trainer.fsdp_sft_trainer import FSDPSFTTrainer
from trainer.manifest import MANIFEST, check_whole, find_damage, find_defect
from trainer.nonfinite import FailedStep
from trainer.replay import replay

SETTINGS = {"trainer__save_checkpoint_steps": 3, "trainer__keep_checkpoints": 9}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, equations):
    """A run of six steps with two checkpoints, to copy from."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(finished, small_run, tmp_path):
    """A copy of a run of six steps with checkpoints after the third and the last."""
    if not finished.exists():
        shutil.copytree(train(small_run("whole", **SETTINGS, trainer__max_steps=6)), finished)
    return shutil.copytree(finished, tmp_path / "run")


def again(small_run, **changes):
    return train(small_run("run", **SETTINGS | {"trainer__max_steps": 6} | changes))


def test_one_flipped_byte_anywhere_is_noticed(run):
    checkpoint = run / "checkpoints" / "step_00000006"
    check_whole(checkpoint)
    rng = random.Random(0)
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        few = [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(20))]
        for place in range(0, len(content), 5) if file.name == MANIFEST else few:
            changed = bytearray(content)
            changed[place] ^= rng.randrange(1, 256)
            file.write_bytes(changed)
            with pytest.raises(ValueError, match="step_00000006"):
                check_whole(checkpoint)
        file.write_bytes(content)
    check_whole(checkpoint)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", MANIFEST])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(run, small_run, capsys, name):
    whole = losses(run)
    file = run / "checkpoints" / "step_00000006" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert losses(again(small_run)) == whole
    said = capsys.readouterr().out
    assert f"step_00000006: {'not a checkpoint' if name == MANIFEST else f'{name} is damaged'}" in said
    assert "resumed from" in said
    assert "step_00000003: 3 of 6 steps are done" in said


def test_no_whole_checkpoint_is_no_new_start(run, small_run):
    for step in (3, 6):
        file = run / "checkpoints" / f"step_{step:08d}" / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"none that is whole.*trainer\.resume=never\n.*step_00000006: __0_0") as error:
        again(small_run)
    assert "step_00000003: __0_0.distcp is damaged" in str(error.value)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert len(losses(again(small_run, trainer__resume="never"))) == 6


def test_what_was_killed_in_its_first_save_starts_anew(run, small_run):
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    (run / "checkpoints" / "step_00000003").rename(run / "checkpoints" / "step_00000003.unfinished")
    assert len(losses(again(small_run))) == 6


@pytest.mark.parametrize(
    "content",
    [b"null", b"[1,2]", b"{}", b'{"step": 3}', b"", b"\xff", b"[" * 100_000, b'{"step": "3", "config": {}}'],
    ids=lambda content: repr(content[:12]),
)
def test_a_broken_manifest_is_named(run, content):
    checkpoint = run / "checkpoints" / "step_00000006"
    (checkpoint / MANIFEST).write_bytes(content)
    assert find_defect(checkpoint).startswith(f"not a checkpoint: {checkpoint / MANIFEST}")


@pytest.mark.parametrize("files", [{"a": 3}, {"a": None}, {"../a": {"bytes": 1, "xxh3": ""}}, {"a": {}}], ids=repr)
def test_a_manifest_with_other_files(run, files):
    checkpoint = run / "checkpoints" / "step_00000006"
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"files": files}))
    assert MANIFEST in find_defect(checkpoint)


def test_ranks_share_the_digests(run):
    checkpoint = run / "checkpoints" / "step_00000006"
    file = checkpoint / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    damages = [find_damage(checkpoint, rank, 2) for rank in range(2)]
    assert sorted(map(bool, damages)) == [False, True]


class Exploit:
    """Runs code when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def poison_metadata(checkpoint, exploit):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(exploit))


def poison_field(checkpoint, exploit):
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = exploit
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_entry(checkpoint, exploit):
    """An entry that DCP would unpickle in the place of a tensor."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    (checkpoint / "__0_0.distcp").write_bytes(pickle.dumps(exploit))
    for index, place in metadata.storage_data.items():
        metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
        place.offset, place.length = 0, (checkpoint / "__0_0.distcp").stat().st_size
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_tensor(checkpoint, exploit):
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    torch.save(exploit, checkpoint / "__0_0.distcp")
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, (checkpoint / "__0_0.distcp").stat().st_size
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("poison", [poison_metadata, poison_field, poison_entry, poison_tensor])
@pytest.mark.parametrize("road", ["resume", "export", "replay"])
def test_a_strangers_checkpoint_runs_no_code(run, small_run, tmp_path, poison, road):
    checkpoint = run / "checkpoints" / "step_00000006"
    poison(checkpoint, Exploit(tmp_path / "exploited"))

    def sign(manifest):
        for name, file in manifest["files"].items():
            file["xxh3"] = digest_file(checkpoint / name)

    change_manifest(checkpoint, sign)
    check_whole(checkpoint)
    config = json.loads((checkpoint / MANIFEST).read_text())["config"]
    roads = {
        "resume": lambda: again(small_run),
        "export": lambda: export(checkpoint, tmp_path / "exported"),
        "replay": lambda: replay(FailedStep(7, 0, 1.0, torch.float32, [], config, str(checkpoint)).write(tmp_path)),
    }
    with pytest.raises(ValueError, match=r"step_00000006: its files are corrupt"):
        roads[road]()
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("kind", ["pickle", "torch", "empty", "text", "list", "fields"])
def test_a_broken_step_that_was_not_finite(tmp_path, kind):
    file = tmp_path / "step.pt"
    match kind:
        case "pickle":
            file.write_bytes(pickle.dumps(Exploit(tmp_path / "exploited")))
        case "torch":
            torch.save(Exploit(tmp_path / "exploited"), file)
        case "empty":
            file.touch()
        case "text":
            file.write_text("no such thing")
        case "list":
            torch.save([1, 2], file)
        case "fields":
            torch.save({"step": 3}, file)
    with pytest.raises(ValueError, match=r"step\.pt (cannot be read|is no step)"):
        FailedStep.read(file)
    assert not (tmp_path / "exploited").exists()


def test_metrics_are_only_shortened_when_new_ones_come(run, small_run, monkeypatch):
    """A resume that fails before its first step, and one on a full disk, leave the lines that were there."""
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    before = (run / "metrics.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(FSDPSFTTrainer, "train_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again(small_run)
    assert (run / "metrics.jsonl").read_text() == before
    kept = before.splitlines(keepends=True)[:3]
    with (
        files_up_to(len("".join(kept)) + 100),
        pytest.raises(OSError, match=r"metrics\.jsonl could not be written: the"),
    ):
        again(small_run)
    assert (run / "metrics.jsonl").read_text().startswith("".join(kept))
    assert [line["step"] for line in metrics(again(small_run))] == [1, 2, 3, 4, 5, 6]


def test_a_broken_line_of_metrics_is_named(run, small_run):
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for broken in ("[1]\n", "{}\n", "\0\0\0\n"):
        content = "".join([lines[0], broken, *lines[2:]])
        (run / "metrics.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"metrics\.jsonl(:2: not| has a line without a step: \{\})"):
            again(small_run)
        assert (run / "metrics.jsonl").read_text() == content


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "hf", "data_report.json", "settings.yaml"])
def test_a_link_is_refused_at_the_start(small_run, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{name} is a symbolic link to .*elsewhere"):
        again(small_run)
    assert (tmp_path / "elsewhere").read_text() == "precious"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_checkpoints_and_the_directory_itself_may_be_links(small_run, tmp_path):
    for name in ("disk", "checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "checkpoints").symlink_to(tmp_path / "checkpoints")
    assert (again(small_run) / "hf").is_dir()
    assert newest(tmp_path / "run").name == "step_00000006"


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_directory_that_is_deleted_in_mid_run_is_an_error(small_run, tmp_path, monkeypatch, how):
    train_step = FSDPSFTTrainer.train_step

    def deleting(self, step, *rest):
        if step == 3:
            (tmp_path / "run").rename(tmp_path / "moved")
            if how == "deleted":
                shutil.rmtree(tmp_path / "moved")
            elif how == "replaced":
                (tmp_path / "run").mkdir()
        return train_step(self, step, *rest)

    monkeypatch.setattr(FSDPSFTTrainer, "train_step", deleting)
    with pytest.raises(OSError, match=r"metrics\.jsonl was deleted or replaced"):
        train(small_run("run", trainer__max_steps=6))


@pytest.mark.parametrize("problem", ["no key", "no net"])
def test_wandb_that_cannot_be_used_is_one_line(small_run, monkeypatch, problem):
    import wandb

    def refuse(**settings):
        assert settings["settings"].init_timeout <= 30
        raise (
            wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")
            if problem == "no key"
            else (wandb.errors.CommError("Run initialization has timed out"))
        )

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"trainer\.logger=\[wandb\]: wandb cannot be used .*WANDB_MODE=offline"):
        train(small_run(trainer__logger=["wandb"]))


def test_weights_of_a_whole_run_are_exported_whole(run, small_run):
    kept = weights(run)
    with files_up_to(10_000), pytest.raises(OSError, match="hf could not be written: the disk is full"):
        again(small_run)
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in kept.items())
