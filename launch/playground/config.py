"""Settings of the page beside those of sample.py: `launch.NAME=VALUE`."""

from dataclasses import dataclass

from data.settings import check_fields, setting
from launch.settings import GROUP


@dataclass
class PlaygroundConfig:
    """Address of the page, and its queue.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 lets other machines use the model
    port: int = setting(7860, at_least=1, at_most=65535)
    waiting: int = setting(8, at_least=1)  # runs that wait for the one that is sampled; more are refused

    def __post_init__(self) -> None:
        check_fields(self, GROUP)
