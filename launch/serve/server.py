"""The process of the server: its socket, its start, its end."""

import asyncio
import errno
import signal
import socket
from collections.abc import Sequence
from ipaddress import ip_address

import uvicorn

from launch.serve.app import create_app
from launch.serve.config import ServeConfig
from launch.serve.engine import tell
from launch.serve.exchange import WRITING
from launch.serve.service import Service
from launch.settings import read_own_settings
from trainer.build import load_for_sampling
from trainer.distributed import check_alone


class Server(uvicorn.Server):
    """Ends requests that are still running some seconds after the signal."""

    def __init__(self, service: Service):
        limit = service.config.shutdown
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # `create_app` prints errors
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(limit) + WRITING,
            )
        )
        self.service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, and tell where."""
        await super().startup(sockets)
        tell(start_line(self.service, *sockets[0].getsockname()[:2]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections, and wait for the requests."""
        ending = asyncio.create_task(self.service.end_within(self.service.config.shutdown))
        await super().shutdown(sockets)
        ending.cancel()


def serve(arguments: Sequence[str]) -> None:
    """Serve the model of a command line until SIGTERM or SIGINT.

    Raises:
        ValueError: a wrong setting, an address that cannot be listened on, several ranks, or no checkpoint of a
            diffusion model.
    """
    check_alone("launch.serve", "python -m launch.serve")
    own, config, lines = read_own_settings(ServeConfig, arguments)
    with bind(own.host, own.port) as listener:
        for line in sorted(lines):
            tell(line)
        model, tokenizer = load_for_sampling(config)
        run(Server(Service(config.model.path, model, tokenizer, config.sampling, own)), listener)


def run(server: Server, listener: socket.socket) -> None:
    """Run a server until a signal."""

    def end(*_: object) -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)  # before uvicorn's handler is set, and after it: uvicorn raises the signal again
    server.service.engine.start()
    try:
        server.run(sockets=[listener])
    finally:
        server.service.close()


def start_line(service: Service, host: str, port: int) -> str:
    """The one line that says what is served where."""
    shown = f"[{host}]" if ":" in host else host
    chats = "" if service.tokenizer.chat_template else "; no chat template: completions only"
    return f"serving {service.name} at http://{shown}:{port}/v1, {service.engine.batch_size} rows at once{chats}"


def bind(host: str, port: int) -> socket.socket:
    """A socket with an address, before the model is loaded. Nobody can connect to it yet.

    Raises:
        ValueError: there is no such address, or its port is taken.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"launch.host={host}: no address of this machine ({error.strerror})") from error
    try:
        listener = _bound(family, kind, address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"launch.port={port}: in use; {_next_free(family, kind, address)}") from error
        raise ValueError(f"launch.host={host} launch.port={port}: {error.strerror}") from error
    if not ip_address(address[0]).is_loopback:
        tell(f"warning: launch.host={host}: whoever reaches this machine can use the model; there is no password")
    return listener


def _bound(family: int, kind: int, address: tuple) -> socket.socket:
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # right after another server has ended
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _next_free(family: int, kind: int, address: tuple) -> str:
    host, port, *others = address
    for free in range(port + 1, 2**16):
        try:
            _bound(family, kind, (host, free, *others)).close()
        except OSError:
            continue
        return f"launch.port={free} is free"
    return "and so are those above it; name a lower one"
