"""The address on which a tool is reached."""

import errno
import socket
from ipaddress import ip_address

from data.terminal import print_stderr


def bind(host: str, port: int) -> socket.socket:
    """A socket with an address, to which nobody can connect before `listen`.

    Raises:
        ValueError: there is no such address, or its port is taken; the message names the next free one.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: a part between dots is empty or over 63 characters
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise ValueError(f"launch.host={host}: no address of this machine ({reason})") from error
    try:
        return _bound(family, kind, address)
    except OSError as error:
        raise _refused(error, family, kind, address) from error


def listen(bound: socket.socket) -> None:
    """Let clients connect. Prints a warning if other machines can.

    Raises:
        ValueError: another process has begun to listen on the port; the message names the next free one.
    """
    address = bound.getsockname()
    try:
        bound.listen()
    except OSError as error:
        raise _refused(error, bound.family, bound.type, address) from error
    if not ip_address(address[0]).is_loopback:
        print_stderr(f"warning: launch.host={address[0]}: other machines can use the model; there is no password")


def _refused(error: OSError, family: int, kind: int, address: tuple) -> ValueError:
    host, port = address[:2]
    if error.errno == errno.EADDRINUSE:
        return ValueError(f"launch.port={port}: in use; {_next_free(family, kind, address)}")
    return ValueError(f"launch.host={host} launch.port={port}: {error.strerror}")


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
