"""Uploads to the hub, which stands in here: permission is asked before training."""

import pytest
from huggingface_hub import HfApi

from tests.trainer.runs import train


class Hub:
    def __init__(self, monkeypatch):
        self.calls, self.broken = [], None
        for name in ("create_repo", "upload_folder"):
            monkeypatch.setattr(HfApi, name, lambda _, *args, name=name, **settings: self.take(name, args, settings))

    def take(self, name, arguments, settings):
        self.calls.append((name, arguments, settings))
        if name == self.broken:
            raise OSError("no answer\nat all")


@pytest.fixture
def hub(monkeypatch):
    return Hub(monkeypatch)


def test_the_model_is_uploaded_privately(small_run, hub, capsys):
    run = train(small_run(trainer__push_to_hub="me/mine", trainer__max_steps=1))
    assert hub.calls == [
        ("create_repo", ("me/mine",), {"private": True, "exist_ok": True}),
        ("upload_folder", (), {"repo_id": "me/mine", "folder_path": run / "hf"}),
    ]
    assert "https://huggingface.co/me/mine" in capsys.readouterr().out


def test_without_permission_nothing_is_trained(small_run, hub, tmp_path):
    hub.broken = "create_repo"
    with pytest.raises(ValueError, match=r"trainer\.push_to_hub=me/mine: no answer"):
        train(small_run(trainer__push_to_hub="me/mine"))
    assert not (tmp_path / "run").exists()


def test_a_failed_upload_leaves_the_model_and_names_the_command(small_run, hub, tmp_path):
    hub.broken = "upload_folder"
    with pytest.raises(OSError, match=r"hf is written, but not uploaded .*: hf upload me/mine .*hf"):
        train(small_run(trainer__push_to_hub="me/mine", trainer__max_steps=1))
    assert (tmp_path / "run" / "hf" / "model.safetensors").exists()
