"""Trackers: all get the same, continue a resumed run, and cannot end a run."""

import json
import shutil
import sqlite3
import sys
import uuid
from pathlib import Path

import pytest
import trackio
import wandb
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sampling import SamplingConfig
from tests.trainer.runs import metrics, train
from trainer.config import to_dict
from trainer.trackers import TRACKERS, TrackedRun, Trackio, ValSample, Wandb

SAMPLED = {"trainer__val_samples": 1, "trainer__val_check_interval": 3, "trainer__save_checkpoint_steps": 3}


class Fake:
    """A tracker that keeps what it gets."""

    def __init__(self, run: TrackedRun):
        self.run, self.steps, self.tables, self.texts, self.closed = run, [], [], {}, []

    def log(self, step, metrics):
        self.steps.append((step, metrics))

    def table(self, step, samples):
        self.tables.append((step, samples))

    def text(self, name, text):
        self.texts[name] = text

    def close(self, failed):
        self.closed.append(failed)


@pytest.fixture
def fakes(monkeypatch):
    """The fake trackers of all runs, in the place of wandb."""
    made = []
    monkeypatch.setitem(TRACKERS, "wandb", lambda run: made.append(Fake(run)) or made[-1])
    return made


def sampled(small_run, **changes):
    config = small_run(**SAMPLED, **changes)
    config.sampling = SamplingConfig(max_new_tokens=4, steps=2)
    return config


def test_what_a_tracker_gets(small_run, fakes):
    config = sampled(small_run, trainer__logger=["wandb"], trainer__max_steps=6)
    run = train(config)
    [tracker] = fakes
    assert [{"step": step, **each} for step, each in tracker.steps] == metrics(run)
    assert [step for step, _ in tracker.tables] == [3, 6]
    assert tracker.run.settings == to_dict(config) == yaml.safe_load((run / "settings.yaml").read_text())
    assert (run / "data_report.txt").read_text().startswith(tracker.texts["run/data_report"])
    assert tracker.texts["run/plan"].splitlines()[0].startswith("model:")
    assert tracker.closed == [False]


def test_a_resumed_run_is_the_same_one(small_run, fakes):
    train(sampled(small_run, trainer__logger=["wandb"], trainer__max_steps=4))
    shutil.rmtree(Path(small_run().trainer.output_dir) / "checkpoints" / "step_00000004")
    train(sampled(small_run, trainer__logger=["wandb"], trainer__max_steps=6))
    first, second = fakes
    assert first.run.id == second.run.id
    assert (second.run.done, second.run.sent) == (3, 4)
    assert second.texts == {}
    shutil.rmtree(Path(small_run().trainer.output_dir) / "checkpoints")
    train(sampled(small_run, trainer__logger=["wandb"], trainer__max_steps=2))
    assert fakes[2].run.id != first.run.id
    assert (fakes[2].run.done, fakes[2].run.sent) == (0, 0)


def test_a_tracker_that_is_added_later_gets_all_from_there_on(small_run, fakes):
    train(sampled(small_run, trainer__max_steps=4))
    shutil.rmtree(Path(small_run().trainer.output_dir) / "checkpoints" / "step_00000004")
    train(sampled(small_run, trainer__logger=["wandb"], trainer__max_steps=6))
    [tracker] = fakes
    assert (tracker.run.done, tracker.run.sent) == (3, 0)
    assert set(tracker.texts) == {"run/plan", "run/data_report"}


def test_a_tracker_that_cannot_be_opened_closes_the_others(small_run, fakes, monkeypatch):
    monkeypatch.setattr("trainer.trackers.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="trackio"):
        train(sampled(small_run, trainer__logger=["wandb", "trackio"]))
    assert fakes[0].closed == [True]


@pytest.mark.parametrize("method", ["log", "table", "text", "close"])
def test_a_run_outlives_a_tracker(small_run, fakes, monkeypatch, capsys, method):
    def gone(*_, **__):
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(Fake, method, gone)
    run = train(sampled(small_run, trainer__logger=["wandb"], trainer__max_steps=3))
    assert len(metrics(run)) == 3
    assert capsys.readouterr().out.count("wandb gets no more of this run (Connection lost)") == 1


def test_a_failed_run_is_marked(small_run, fakes, monkeypatch):
    monkeypatch.setattr("trainer.loop.TrainingLoop.train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(sampled(small_run, trainer__logger=["wandb"]))
    assert fakes[0].closed == [True]


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_without_the_extra(small_run, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("trainer.trackers.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"trainer\.logger=\[{name}\] needs it: pip install 'diffllm\[{name}\]'"):
        train(small_run(trainer__logger=[name]))


def test_wandb_goes_on_with_the_same_run(small_run):
    config = small_run(trainer__logger=["wandb"], trainer__max_steps=4, trainer__save_checkpoint_steps=2)
    run = train(config)
    first = (run / "tracker_id").read_text()
    config.trainer.max_steps = 6
    train(config)
    assert (run / "tracker_id").read_text() == first
    runs = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert runs
    assert all(name.endswith(first) for name in runs)


def tracked(directory: Path, done: int = 0, sent: int = 0, **changes) -> TrackedRun:
    return TrackedRun(**{
        "directory": directory, "project": f"test-{uuid.uuid4().hex}", "name": "run", "id": "abcd",
        "settings": {"optim": {"lr": 1.0}}, "done": done, "sent": sent, **changes,
    })  # fmt: skip


SAMPLE = ValSample("a|b\nc", "<i>d</i>", "e")


def test_wandb_gets_no_step_twice(tmp_path, monkeypatch):
    logged = []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    tracker = Wandb(tracked(tmp_path, done=2, sent=4))
    for step in (3, 4, 5):
        tracker.table(step, [SAMPLE])
        tracker.log(step, {"train/loss": 1.0})
    assert [step for step, _ in logged] == [5, 5]
    assert logged[0][1]["val/samples"].data == [[5, *SAMPLE]]
    tracker.text("run/plan", "<b>")
    assert "&lt;b&gt;" in logged[-1][1]["run/plan"].html


def test_tensorboard_has_tables_and_texts(small_run):
    config = sampled(small_run, trainer__logger=["tensorboard"], trainer__max_steps=6)
    events = EventAccumulator(str(train(config) / "tensorboard"))
    events.Reload()
    names = {f"{name}/text_summary" for name in ("run/settings", "run/plan", "run/data_report", "val/samples")}
    assert set(events.Tags()["tensors"]) == names
    assert [event.step for event in events.Tensors("val/samples/text_summary")] == [3, 6]
    [settings] = events.Tensors("run/settings/text_summary")
    assert b"max_steps: 6" in settings.tensor_proto.string_val[0]
    [first, _] = events.Tensors("val/samples/text_summary")
    assert b"<th>prompt</th>" in first.tensor_proto.string_val[0]
    assert b"&lt;|im_start|&gt;user" in first.tensor_proto.string_val[0]


def records(project: str) -> list[tuple[str, int, dict]]:
    """Run, step and content of all records of a project of trackio, in their order."""
    with sqlite3.connect(trackio.utils.TRACKIO_DIR / f"{project}.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    return [(name, step, json.loads(content)) for name, step, content in rows]


def test_trackio_has_every_step_once(small_run):
    project = f"test-{uuid.uuid4().hex}"
    changes = {"trainer__logger": ["trackio"], "trainer__project_name": project, "trainer__experiment_name": "mine"}
    train(sampled(small_run, **changes, trainer__max_steps=4))
    shutil.rmtree(Path(small_run().trainer.output_dir) / "checkpoints" / "step_00000004")
    run = train(sampled(small_run, **changes, trainer__max_steps=6))
    found = records(project)
    assert {name for name, _, _ in found} == {f"mine-{(run / 'tracker_id').read_text()}"}
    steps = [(step, content) for _, step, content in found if "train/loss" in content]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert [{"step": step, **content} for step, content in steps][4:] == metrics(run)[4:]
    assert [step for _, step, content in found if "val/samples" in content] == [3, 4, 6]
    assert [name for _, _, content in found[:2] for name in content] == ["run/plan", "run/data_report"]
    with sqlite3.connect(trackio.utils.TRACKIO_DIR / f"{project}.db") as database:
        [[config]] = database.execute("select config from configs").fetchall()
    assert json.loads(config)["optim"]["lr"] == 1e-3


def test_trackio_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "file" / "db")
    with pytest.raises(ValueError, match=r"trainer\.logger=\[trackio\]: .*TRACKIO_DIR"):
        Trackio(tracked(tmp_path))
    monkeypatch.undo()
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "none")
    with pytest.raises(ValueError, match=r"trainer\.logger=\[trackio\]: .*127\.0\.0\.1:1"):
        Trackio(tracked(tmp_path))
