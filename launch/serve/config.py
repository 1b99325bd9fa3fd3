"""Settings of the server beside those of sample.py: `launch.NAME=VALUE`."""

from dataclasses import dataclass

from data.settings import check_fields, setting
from launch.settings import GROUP


@dataclass
class ServeConfig:
    """Address and limits of the server.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 lets other machines use the model
    port: int = setting(8000, at_least=0, at_most=65535)  # 0 takes a free one
    queue: int = setting(256, at_least=0)  # requests that wait for a place in the batch; others are refused
    timeout: float = setting(600.0, above=0, at_most=1e6)  # seconds for a request
    shutdown: float = setting(30.0, at_least=0, at_most=1e6)  # seconds for running requests after SIGTERM or SIGINT
    max_body: int = setting(2**21, at_least=1)  # bytes of a request

    def __post_init__(self) -> None:
        check_fields(self, GROUP)
