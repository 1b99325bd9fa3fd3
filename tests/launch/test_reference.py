"""conf/README.md: in step with the dataclasses and the files of conf/."""

from dataclasses import fields, is_dataclass

import pytest

from data.settings import bounds
from launch import CONF, reference
from sampling.config import CHOICES, RANGES
from trainer.config import Config
from trainer.schema import field_names


def cells(name: str) -> list[str]:
    """The row of a setting."""
    [line] = [line for line in reference.PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    return [cell.replace("\\|", "|") for cell in line.removeprefix("| ").removesuffix(" |").split(" | ")]


@pytest.fixture(scope="module")
def page() -> str:
    """The page as it should be."""
    return reference.page()


def test_the_page_is_in_step(page):
    assert reference.PAGE.read_text() == page, "run `python -m launch.reference`"


def test_every_setting_and_choice_is_there():
    page = reference.PAGE.read_text()
    groups = {item.name for item in fields(Config) if is_dataclass(item.type)}
    assert [name for name in field_names() if name not in groups and f"\n| `{name}` |" not in page] == []
    for file in CONF.glob("*/**/*.yaml"):
        group, *names = file.relative_to(CONF).with_suffix("").parts
        assert f"\n| `{group}={'/'.join(names)}` |" in page


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


def test_the_command_writes_the_page(page, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reference, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(reference, "page", lambda: page)
    reference.main([])
    assert (tmp_path / "README.md").read_text() == page
    assert str(tmp_path) in capsys.readouterr().out
