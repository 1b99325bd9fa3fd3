"""The address on which a tool is reached."""

import errno
import socket
import sys
from ipaddress import ip_address

from data.terminal import printable


def bind(host: str, port: int) -> socket.socket:
    """A socket with an address, to which nobody can connect yet.

    Prints a warning if other machines reach it.

    Raises:
        ValueError: there is no such address, or its port is taken; the message names the next free one.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"launch.host={host}: no address of this machine ({error.strerror})") from error
    try:
        bound = _bound(family, kind, address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"launch.port={port}: in use; {_next_free(family, kind, address)}") from error
        raise ValueError(f"launch.host={host} launch.port={port}: {error.strerror}") from error
    if not ip_address(address[0]).is_loopback:
        warning = f"warning: launch.host={host}: whoever reaches this machine can use the model; there is no password"
        print(printable(warning), file=sys.stderr)
    return bound


def _bound(family: int, kind: int, address: tuple) -> socket.socket:
    bound = socket.socket(family, kind)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # right after another process has ended
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def _next_free(family: int, kind: int, address: tuple) -> str:
    host, port, *others = address
    for free in range(port + 1, 2**16):
        try:
            _bound(family, kind, (host, free, *others)).close()
        except OSError:
            continue
        return f"launch.port={free} is free"
    return "and so are those above it; name a lower one"
