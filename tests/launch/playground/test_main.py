"""The command line of the page."""

import socket
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from launch.address import bind, listen
from launch.playground import __main__ as command
from launch.playground.__main__ import Presets, serve
from launch.playground.config import PlaygroundConfig
from launch.settings import read_own_settings

read = partial(read_own_settings, "launch.playground", PlaygroundConfig)


def test_own_arguments_stand_beside_the_settings():
    own, config, _ = read(["launch.host=0.0.0.0", "launch.port=7999", "sampling.steps=4"])
    assert own == PlaygroundConfig("0.0.0.0", 7999)
    assert config.sampling.steps == 4
    assert read([])[0] == PlaygroundConfig("127.0.0.1", 7860, 8)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("launch.port=0", r"launch\.port=0: must be in \[1, 65535\]"),
        ("launch.port=x", r"launch\.port=x"),
        ("launch.waiting=0", r"launch\.waiting=0: must be at least 1"),
        ("launch.hosst=a", r"launch\.hosst=a: no such setting; did you mean launch\.host"),
        ("record=run.jsonl", r"record=run\.jsonl: launch\.playground does not read it"),
        ("sampling.steps=0", "sampling.steps=0"),
    ],
)
def test_arguments_that_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        read([argument])


def test_presets_are_the_choices_of_sampling():
    presets = Presets(["sampling=dream", "sampling.steps=4", "launch.port=7999"])
    assert "fast" in presets.names
    assert "llada_instruct/gsm8k" in presets.names
    fast = presets("fast")
    assert (fast.transfer, fast.steps) == ("threshold", None)
    with pytest.raises(ValueError, match="no such choice"):
        presets("fest")


def test_a_causal_model_ends_the_command_in_one_line(tmp_path, capsys):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'diffllm[page]'")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ValueError, match="a causal model, which has not learnt to restore masked tokens"):
        serve([f"model.path={tmp_path}", f"launch.port={port}"])


def test_a_port_that_is_taken_while_the_model_is_loaded(small_model, tokenizer, monkeypatch):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'diffllm[page]'")
    with bind("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(command, "load_for_sampling", lambda _: listen(other) or (small_model, tokenizer))
        with pytest.raises(ValueError, match=rf"launch\.port={port}: in use"):
            serve([f"launch.port={port}"])


def test_an_address_of_ipv6(small_model, tokenizer, monkeypatch, capsys):
    gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'diffllm[page]'")
    if not socket.has_dualstack_ipv6():
        pytest.skip("needs IPv6")
    with bind("::1", 0) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(command, "load_for_sampling", lambda _: (small_model, tokenizer))
    monkeypatch.setattr(command, "Event", lambda: SimpleNamespace(wait=gradio.close_all))
    serve(["launch.host=::1", f"launch.port={port}"])
    assert capsys.readouterr().out.startswith(f"http://[::1]:{port}/ ")


@pytest.mark.parametrize(
    ("missing", "error", "named"), [("gradio", ValueError, r"diffllm\[page\]"), ("launch.meanings", ImportError, None)]
)
def test_an_import_that_fails(monkeypatch, missing, error, named):
    """Only a missing gradio is a missing extra."""
    if missing != "gradio":
        pytest.importorskip("gradio", reason="needs gradio: pip install 'diffllm[page]'")
    monkeypatch.delitem(sys.modules, "launch.playground.page", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(command, "bind", lambda host, port: socket.socket())
    with pytest.raises(error, match=named):
        serve([])
