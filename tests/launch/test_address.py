"""The address on which a tool is reached."""

import errno
import re
import socket

import pytest

from launch.address import bind, listen


def test_a_port_in_use_names_the_next_free_one():
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"launch\.port={taken}: .*launch\.port=(\d+)") as error:
            bind("127.0.0.1", taken)
    named = int(str(error.value).rpartition("launch.port=")[2].split()[0])
    assert named > taken
    bind("127.0.0.1", named).close()


def test_of_two_that_bind_at_once_one_listens():
    with bind("127.0.0.1", 0) as first, socket.socket() as client:
        address = first.getsockname()
        assert client.connect_ex(address) == errno.ECONNREFUSED
        with bind(*address) as second:
            listen(first)
            with pytest.raises(ValueError, match=rf"launch\.port={address[1]}: .*launch\.port=\d+"):
                listen(second)
        with socket.create_connection(address):
            pass


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_address_of_this_machine_alone(host, capsys):
    with bind(host, 0) as bound:
        listen(bound)
    assert capsys.readouterr().err == ""


def test_an_address_that_others_reach_is_warned_of_once(capsys):
    with bind("0.0.0.0", 0) as bound:
        listen(bound)
    assert re.findall("warning: .*?:", capsys.readouterr().err) == ["warning: launch.host=0.0.0.0:"]


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1", "a" * 70, "a..b"])
def test_an_address_of_another_machine(host):
    with pytest.raises(ValueError, match=rf"launch\.host={host}"):
        bind(host, 0)
