"""conf/README.md: in step with the dataclasses and the files of conf/."""

from dataclasses import dataclass, fields, is_dataclass

import pytest

from data.settings import bounds, setting
from diffllm import DiffusionConfig
from diffllm.diffusion import OBJECTIVES
from launch import CONF, reference
from sampling.config import CHOICES, RANGES
from trainer.config import Config
from trainer.schema import field_names

SCHEMAS = [Config, *(item.type for item in fields(Config) if is_dataclass(item.type))]
SCHEMAS += [objective.settings for objective in OBJECTIVES.values()]


def cells(name: str) -> list[str]:
    """The row of a setting."""
    [line] = [line for line in reference.PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    return [cell.replace("\\|", "|") for cell in line.removeprefix("| ").removesuffix(" |").split(" | ")]


def test_the_page_is_in_step():
    assert reference.PAGE.read_text() == reference.page(), "run `python -m launch.reference`"


def test_every_setting_and_choice_is_there():
    page = reference.PAGE.read_text()
    groups = {item.name for item in fields(Config) if is_dataclass(item.type)}
    assert [name for name in field_names() if name not in groups and f"\n| `{name}` |" not in page] == []
    for file in CONF.glob("*/**/*.yaml"):
        group, *names = file.relative_to(CONF).with_suffix("").parts
        assert f"\n| `{group}={'/'.join(names)}` |" in page


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_field_has_a_meaning(schema):
    assert [item.name for item in fields(schema) if not reference.meanings(schema)[item.name]] == []


@pytest.mark.parametrize("file", sorted(CONF.glob("*/**/*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_every_choice_begins_with_a_comment(file):
    assert reference.choice_meaning(file)


def test_a_row():
    _, kind, default, allowed, meaning, read = cells("trainer.patience")
    assert (kind, default, allowed) == ("`int | None`", "`null`", "at least 1")
    assert "validations in a row" in meaning
    assert "`trainer/loop.py`" in read
    assert cells("optim.lr_schedule")[3] == "`cosine`, `linear`, `constant`, `wsd`"
    assert cells("sampling.top_p")[3] == RANGES["top_p"].text == "in (0, 1]"
    assert cells("sampling.cache")[3] == ", ".join(f"`{name}`" for name in CHOICES["cache"])
    assert cells("sampling.stop")[2] == "`[]`"


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
    known = reference.meanings(Own)
    assert [known[name] for name in ("first", "second", "third", "fourth")] == [
        *("beside", "above in two lines", "within", "")
    ]
    assert known["eps"] == reference.meanings(DiffusionConfig)["eps"]  # redeclared without a comment


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({}, None),
        ({"at_least": 0}, "at least 0"),
        ({"above": 0}, "positive"),
        ({"above": 2}, "above 2"),
        ({"at_least": 0, "below": 1}, "in [0, 1)"),
        ({"above": 0, "at_most": 1}, "in (0, 1]"),
    ],
)
def test_ranges_as_text(limits, text):
    assert bounds(limits) == text


def test_the_command_writes_the_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reference, "PAGE", tmp_path / "README.md")
    reference.main([])
    assert (tmp_path / "README.md").read_text() == reference.page()
    assert str(tmp_path) in capsys.readouterr().out
