"""The process of the server: its socket, its start, its end."""

import asyncio
import signal
import socket
from collections.abc import Sequence

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from data.terminal import print_stderr
from launch.address import bind, listen
from launch.serve.app import create_app
from launch.serve.config import ServeConfig
from launch.serve.exchange import WRITING
from launch.serve.service import Service
from launch.settings import read_own_settings
from trainer.build import load_for_sampling
from trainer.distributed import check_alone

HEADER_SECONDS = 10


class Connection(H11Protocol):
    """A connection, which is closed if a request's header is not whole in time. uvicorn would wait for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Expect a request."""
        super().connection_made(transport)
        self._time_header()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        super().data_received(data)
        self._time_header()

    def _time_header(self) -> None:
        """Stop the timer if a header is whole, else start it."""
        whole = self.cycle is not None and not self.cycle.response_complete
        if whole and self._timer:
            self._timer.cancel()
            self._timer = None
        elif not whole and not self._timer:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)


class Server(uvicorn.Server):
    """Ends requests that are still running some seconds after the signal."""

    def __init__(self, service: Service):
        limit = service.config.shutdown
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=Connection,
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
        """Accept connections, and print the address."""
        await super().startup(sockets)
        print_stderr(start_line(self.service, *sockets[0].getsockname()[:2]))

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
    own, config, lines = read_own_settings("launch.serve", ServeConfig, arguments)
    with bind(own.host, own.port) as listener:
        for line in sorted(lines):
            print_stderr(line)
        model, tokenizer = load_for_sampling(config)
        model.check_sampling(config.sampling)
        server = Server(Service(config.model.path, model, tokenizer, config.sampling, own))
        listen(listener)
        run(server, listener)


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
