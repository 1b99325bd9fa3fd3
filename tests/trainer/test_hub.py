"""Uploads to the hub, which stands in here: permission is asked before training."""

import pytest
from httpx import Request, Response
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from tests.trainer.runs import train
from trainer.hub import check_push


class Hub:
    """Records the calls of HfApi; `broken` ones fail as without a network."""

    def __init__(self, monkeypatch):
        self.calls, self.broken, self.knows = [], None, True
        for name in ("auth_check", "create_repo", "upload_folder"):
            monkeypatch.setattr(HfApi, name, lambda _, *args, name=name, **settings: self.take(name, args, settings))

    def take(self, name, arguments, settings):
        self.calls.append((name, arguments, settings))
        if name == self.broken:
            raise RuntimeError("no answer\nat all")
        if name == "auth_check" and not self.knows:
            raise RepositoryNotFoundError("none", response=Response(404, request=Request("GET", "http://hub")))


@pytest.fixture
def hub(monkeypatch):
    return Hub(monkeypatch)


@pytest.mark.parametrize("knows", [True, False])
def test_the_model_is_uploaded(small_run, hub, capsys, knows):
    hub.knows = knows
    run = train(small_run(trainer__push_to_hub="me/mine", trainer__max_steps=1))
    made = [] if knows else [("create_repo", ("me/mine",), {"private": True})]
    assert hub.calls == [
        ("auth_check", ("me/mine",), {"write": True}),
        *made,
        ("upload_folder", (), {"repo_id": "me/mine", "folder_path": run / "hf"}),
    ]
    assert "https://huggingface.co/me/mine" in capsys.readouterr().out


@pytest.mark.parametrize("silent_hub", ["not at all"], indirect=True)
def test_a_hub_that_does_not_answer(silent_hub):
    with pytest.raises(ValueError, match=r"trainer\.push_to_hub=me/mine: "):
        check_push("me/mine")


def test_without_permission_nothing_is_trained(small_run, hub, tmp_path):
    hub.broken = "auth_check"
    with pytest.raises(ValueError, match=r"trainer\.push_to_hub=me/mine: no answer"):
        train(small_run(trainer__push_to_hub="me/mine"))
    assert not (tmp_path / "run").exists()


def test_a_failed_upload_leaves_the_model_and_names_the_command(small_run, hub, tmp_path):
    hub.broken = "upload_folder"
    with pytest.raises(OSError, match=r"hf is written, but not uploaded .*: hf upload me/mine .*hf"):
        train(small_run(trainer__push_to_hub="me/mine", trainer__max_steps=1))
    assert (tmp_path / "run" / "hf" / "model.safetensors").exists()
