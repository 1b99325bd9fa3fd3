"""The command: its arguments, its address, its start and its end."""

import re
import runpy
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import openai
import pytest

from diffllm.tokenizer import builtin_tokenizer
from launch.address import bind, listen
from launch.serve import server
from launch.serve.config import ServeConfig
from launch.settings import read_own_settings
from tests.conftest import GOLDEN, ROOT
from tests.diffllm.decoders import write_decoder
from tests.launch.serve.serving import ASK, sure_model
from tests.trainer.processes import Run

read = partial(read_own_settings, "launch.serve", ServeConfig)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("serve") / "model"
    sure_model().save_pretrained(directory, tokenizer=builtin_tokenizer())
    return directory


def test_a_process(checkpoint, tmp_path):
    """SIGTERM ends a stream that takes too long with an error, and the process with exit code 0."""
    arguments = [f"model.path={checkpoint}", "launch.port=0", "launch.shutdown=0.2", "sampling.max_new_tokens=8"]
    environment = {"PYTHONPATH": str(ROOT)}
    with Run(tmp_path, sys.executable, "-m", "launch.serve", *arguments, **environment) as run:
        run.wait_for(lambda: "rows at once\n" in run.text)
        url = re.search(r"http://127\.0\.0\.1:\d+/v1", run.text)[0]
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client, ThreadPoolExecutor(1) as clients:
            ask = {"model": str(checkpoint), "messages": ASK}
            assert client.chat.completions.create(**ask).usage.completion_tokens <= 8
            long = {"alg": "left_to_right", "stop_at_eos": False, "drafts": True}
            parts = iter(client.chat.completions.create(**ask, max_tokens=2000, stream=True, extra_body=long))
            assert next(parts).choices[0].delta.role == "assistant"
            rest = clients.submit(lambda: [*parts])
            run.process.send_signal(signal.SIGTERM)
            assert rest.exception().code == "server_stops"
        assert run.process.wait(60) == 0
        assert [line.split()[0] for line in run.text.splitlines()] == ["sampling", "serving", "stopping:"]


def test_settings(checkpoint, capsys):
    own, config, _ = read([f"model.path={checkpoint}", "launch.port=81", "launch.timeout=5", "sampling=fast"])
    assert (own.host, own.port, own.timeout) == ("127.0.0.1", 81, 5.0)
    assert config.sampling.transfer == "threshold"
    assert capsys.readouterr().err == ""
    read([f"model.path={checkpoint}", "optim.lr=1"])
    assert "launch.serve does not read optim.lr" in capsys.readouterr().err


def test_recommended_settings():
    """Those of sample.py, where the command line gives none."""
    path = GOLDEN / "dream_tiny"
    _, config, lines = read([f"model.path={path}", "sampling.top_p=0.5"])
    assert (config.sampling.temperature, config.sampling.top_p, len(lines)) == (0.2, 0.5, 1)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("launch.prot=1", ["launch.prot=1", "launch.port"]),
        ("port=1", ["port=1", "launch.port"]),
        ("launch.port=70000", ["launch.port=70000"]),
        ("launch.port=many", ["launch.port=many"]),
        ("launch.timeout=0", ["launch.timeout=0"]),
        ("launch.queue=-1", ["launch.queue=-1"]),
        ("sampling.steps=0", ["sampling.steps=0"]),
        ("sampling.stepps=1", ["sampling.stepps=1", "sampling.steps"]),
        ("model.path=nowhere", ["nowhere"]),
        ("prompt=Hi", ["prompt=Hi", "launch.serve does not read it"]),
    ],
)
def test_wrong_arguments(argument, words):
    with pytest.raises(ValueError, match=r".") as error:
        server.serve(["launch.port=0", argument])
    assert all(word in str(error.value) for word in words)


def test_a_port_that_is_taken_while_the_model_is_loaded(checkpoint, monkeypatch):
    with bind("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(server, "load_for_sampling", lambda _: listen(other) or (sure_model(), builtin_tokenizer()))
        with pytest.raises(ValueError, match=rf"launch\.port={port}: in use"):
            server.serve([f"model.path={checkpoint}", f"launch.port={port}"])


def test_a_causal_model(tmp_path):
    path = write_decoder("qwen2", tmp_path / "causal", builtin_tokenizer())
    with pytest.raises(ValueError, match=r"model\.path=.*causal"):
        server.serve([f"model.path={path}", "launch.port=0"])


def test_the_command(monkeypatch, capsys):
    """Mistakes end in one line; a package that is missing is named with its extra."""
    monkeypatch.setattr(sys, "argv", ["launch.serve", "launch.port=many"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("launch.serve", run_name="__main__")
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: launch.port=many")
    monkeypatch.setattr(sys, "argv", ["launch.serve", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("launch.serve", run_name="__main__")
    assert ended.value.code in (0, None)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [name for name in sys.modules if name.startswith("launch.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("launch.serve", run_name="__main__")
    assert "diffllm[serve]" in ended.value.code
