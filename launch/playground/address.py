"""Address of the page."""

import socket
from dataclasses import dataclass
from ipaddress import ip_address

from data.settings import check_fields, setting
from launch.settings import GROUP

LOOPBACK = "127.0.0.1"
TRIED = 100  # ports after a busy one


@dataclass(frozen=True)
class Address:
    """Address of the page, and its queue.

    Raises:
        ValueError: a value outside its range.
    """

    host: str = LOOPBACK  # another one than the loopback lets others use the model
    port: int = setting(7860, at_least=1, at_most=65535)
    waiting: int = setting(8, at_least=1)  # runs that wait for the one that is sampled; more are refused

    def __post_init__(self) -> None:
        check_fields(self, GROUP)

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check_free(self) -> None:
        """Refuse a port that is in use.

        Raises:
            ValueError: it is; the message names the next free one. Or the host is no address of this machine.
        """
        reason = self._refusal(self.port)
        if reason is None:
            return
        free = next((port for port in range(self.port + 1, self.port + TRIED) if self._refusal(port) is None), None)
        if free is None:
            raise ValueError(f"launch.host={self.host} launch.port={self.port}: {reason}; give another")
        raise ValueError(f"launch.port={self.port}: {reason}; launch.port={free} is free")

    def _refusal(self, port: int) -> str | None:
        """Return the reason if a port cannot be served."""
        try:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            with socket.create_server((self.host, port), family=family):
                return None
        except OSError as error:
            return (error.strerror or str(error)).partition(" (")[0]  # Python repeats the address
        except OverflowError as error:  # beyond the last port
            return str(error)
