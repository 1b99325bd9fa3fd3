"""Settings of the server beside those of sample.py: `launch.NAME=VALUE`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.settings import check_fields, setting
from launch.cli import quote_text, warn_of_unread
from launch.settings import read_settings
from trainer.config import Config

GROUP = "launch"
READS = ("model", "sampling")


@dataclass
class ServeConfig:
    """Address and limits of the server.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    host: str = "127.0.0.1"  # address to listen on; another one than this machine's own lets others in
    port: int = setting(8000, at_least=0, at_most=65535)  # 0 takes a free one
    queue: int = setting(256, at_least=0)  # requests that wait for a place in the batch; others are refused
    timeout: float = setting(600.0, above=0, at_most=1e6)  # seconds for a request
    shutdown: float = setting(30.0, at_least=0, at_most=1e6)  # seconds for running requests after SIGTERM or SIGINT
    max_body: int = setting(2**21, at_least=1)  # bytes of a request

    def __post_init__(self) -> None:
        check_fields(self, GROUP)


def read_arguments(arguments: Sequence[str]) -> tuple[ServeConfig, Config, set[str]]:
    """The server's settings, those of sample.py, and the line that names recommended ones.

    Raises:
        ValueError: an unknown name, a value outside its range, or see `read_settings`.
    """
    lines: set[str] = set()
    values, config, _ = read_settings(arguments, [f"{GROUP}.{item.name}" for item in fields(ServeConfig)], lines)
    warn_of_unread([quote_text(each) for each in arguments if not each.startswith(f"{GROUP}.")], READS)
    try:
        own = {name.partition(".")[2]: value for name, value in values.items()}
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ServeConfig), own)), config, lines
    except OmegaConfBaseException as error:
        name = f"{GROUP}.{error.full_key}"
        raise ValueError(f"{name}={values[name]}: {error.msg.splitlines()[0]}") from error
