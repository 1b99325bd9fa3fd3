"""Meanings of settings."""

from dataclasses import dataclass, fields, is_dataclass

import pytest

from data.settings import setting
from diffllm import DiffusionConfig
from diffllm.diffusion import OBJECTIVES
from launch.meanings import meanings
from trainer.config import Config

SCHEMAS = [Config, *(item.type for item in fields(Config) if is_dataclass(item.type))]
SCHEMAS += [objective.settings for objective in OBJECTIVES.values()]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_field_has_a_meaning(schema):
    assert [item.name for item in fields(schema) if not meanings(schema)[item.name]] == []


@dataclass
class Own(DiffusionConfig):
    """Comments as they may stand."""

    first: int = 1  # beside
    # above
    # in two lines
    second: str = setting("a", choices=("a",))
    third: int = setting(
        2,
        at_least=1,  # within
    )
    eps: float = 0.1
    # of nothing

    fourth: int = 3


def test_comments_above_beside_and_within():
    known = meanings(Own)
    assert [known[name] for name in ("first", "second", "third", "fourth")] == [
        *("beside", "above in two lines", "within", "")
    ]
    assert known["eps"] == meanings(DiffusionConfig)["eps"]  # redeclared without a comment
