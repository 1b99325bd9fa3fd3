"""The address on which a tool is reached."""

import socket

import pytest

from launch.address import bind


def test_a_port_in_use_names_the_next_free_one():
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"launch\.port={taken}: .*launch\.port=(\d+)") as error:
            bind("127.0.0.1", taken)
    named = int(str(error.value).rpartition("launch.port=")[2].split()[0])
    assert named > taken
    bind("127.0.0.1", named).close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_address_of_this_machine_alone(host, capsys):
    bind(host, 0).close()
    assert capsys.readouterr().err == ""


def test_an_address_that_others_reach_is_warned_of(capsys):
    bind("0.0.0.0", 0).close()
    assert capsys.readouterr().err.startswith("warning: launch.host=0.0.0.0:")


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1"])
def test_an_address_of_another_machine(host):
    with pytest.raises(ValueError, match=rf"launch\.host={host}"):
        bind(host, 0)
