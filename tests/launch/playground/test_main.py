"""The command line of the page."""

import socket

import pytest

from launch.playground import __main__ as command
from launch.playground.__main__ import Presets, read_arguments, serve
from launch.playground.address import Address


def test_own_arguments_stand_beside_the_settings():
    address, config, _ = read_arguments(["launch.host=0.0.0.0", "launch.port=7999", "sampling.steps=4"])
    assert address == Address("0.0.0.0", 7999)
    assert config.sampling.steps == 4
    assert read_arguments([])[0] == Address("127.0.0.1", 7860, 8)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("launch.port=0", r"launch\.port=0: must be in \[1, 65535\]"),
        ("launch.port=x", r"launch\.port=x"),
        ("launch.waiting=0", r"launch\.waiting=0: must be at least 1"),
        ("launch.hosst=a", r"launch\.hosst=a: no such setting; did you mean launch\.host"),
        ("prompt=Hi", "prompt=Hi: is asked on the page"),
        ("sampling.steps=0", "sampling.steps=0"),
    ],
)
def test_arguments_that_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        read_arguments([argument])


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("192.168.0.2", False), ("a", False)],
)
def test_which_addresses_are_of_this_machine_alone(host, loopback):
    assert Address(host).is_loopback == loopback


def test_a_busy_port_names_the_next_free_one():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"launch\.port={port}: Address already in use; launch\.port=(\d+) is free"
        ) as error:
            Address(port=port).check_free()
    free = int(str(error.value).split("port=")[2].split()[0])
    Address(port=free).check_free()


def test_an_address_of_another_machine():
    with pytest.raises(ValueError, match=r"launch\.host=192\.0\.2\.1"):
        Address("192.0.2.1").check_free()


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


def test_without_gradio_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(command.sys.modules, "launch.playground.page", None)
    monkeypatch.setattr(Address, "check_free", lambda self: None)
    with pytest.raises(ValueError, match=r"pip install 'diffllm\[page\]'"):
        serve([])
