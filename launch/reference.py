"""Write conf/README.md, the page of all settings and choices: `python -m launch.reference`.

Types, defaults, ranges and meanings are those of the dataclasses: the meaning is the comment above or beside a field.
"""

import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from data.settings import bounds
from data.storage import whole_file
from data.terminal import Parser, ending_in_one_line
from diffllm.diffusion import OBJECTIVES, ObjectiveConfig
from launch import CONF, ROOT
from launch.experiments.page import markdown
from launch.meanings import EXPERIMENT, meanings
from launch.reads import Reads
from sampling import SamplingConfig
from sampling.config import CHOICES, RANGES
from trainer.config import Config

PAGE = CONF / "README.md"
PACKAGES = ("data", "diffllm", "sampling", "trainer", "launch")
INTRO = """\
# Settings

`python -m launch.reference` writes this page from the dataclasses that own the settings. On the command line
`GROUP.FIELD=VALUE` sets a field, and `GROUP=CHOICE` takes the file `GROUP/CHOICE.yaml` of this directory; a field on
the command line wins. `python train.py --cfg job` prints the settings of a command line.

`null` is no value. *Read in* names the files that act on a field; tools of `launch/` only if no other file does. A
dataclass checks its fields, and rules over several of them, in `__post_init__`."""


def choice_meaning(file: Path) -> str:
    """The comment that begins a choice's file, in one line; an empty text without one."""
    lines = file.read_text(encoding="utf-8").removeprefix("# @package _global_\n").splitlines()
    return " ".join(line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("# "), lines))


def page() -> str:
    """The whole page."""
    read, top = Reads(_sources()).found, meanings(Config)
    parts = [INTRO]
    for item in fields(Config):
        if not is_dataclass(item.type):
            continue
        parts += [f"## {item.name}", _sentence(top[item.name])]
        if item.type is ObjectiveConfig:
            for name, objective in OBJECTIVES.items():
                parts += [f"### diffusion={name}", *_group(item, objective.settings, read)]
        else:
            parts += _group(item, item.type, read)
        parts += _choices(item.name)
    own = [item for item in fields(Config) if not is_dataclass(item.type)]
    parts += ["## Top level", *_table(Config, own, "", read)]
    parts += ["## experiment", _sentence(EXPERIMENT), *_choices("experiment")]
    return "\n\n".join(parts) + "\n"


def _sources() -> dict[str, str]:
    packages = [file for name in PACKAGES for file in (ROOT / name).rglob("*.py")]
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in [*packages, *ROOT.glob("*.py")]}


def _group(item: Field, schema: type, read: dict[str, set[str]]) -> list[str]:
    """The table of a group, and the fields that may differ when a run resumes."""
    of_group = item.metadata["free_when_resuming"]
    freedom = {each.name: each.metadata.get("free_when_resuming") for each in fields(schema)}
    free = [f"`{name}`" for name, own in freedom.items() if (of_group if own is None else own)]
    if len(free) == len(freedom):
        free = ["all fields"]
    table = _table(schema, fields(schema), f"{item.name}.", read)
    return [*table, *([f"May differ when a run resumes: {', '.join(free)}."] if free else [])]


def _table(schema: type, items: Iterable[Field], prefix: str, read: dict[str, set[str]]) -> list[str]:
    known, file = meanings(schema), Path(inspect.getfile(schema)).relative_to(ROOT)
    rows = [
        [
            f"`{prefix}{item.name}`",
            f"`{item.type.__name__ if type(item.type) is type else str(item.type).replace('typing.', '')}`",
            f"`{_written(item.default if item.default is not MISSING else item.default_factory())}`",
            _allowed(schema, item),
            _cell(known[item.name]),
            ", ".join(f"`{place}`" for place in _readers(read[prefix + item.name])),
        ]
        for item in items
    ]
    head = ["field", "type", "default", "allowed", "meaning", "read in"]
    return [f"`{schema.__name__}` of `{file}`:", markdown([head, *rows])]


def _written(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}: {_written(each)}" for name, each in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _allowed(schema: type, item: Field) -> str:
    """Choices or range of a field."""
    choices, rule = item.metadata.get("choices"), bounds(item.metadata)
    if schema is SamplingConfig:
        choices, rule = CHOICES.get(item.name), RANGES[item.name].text if item.name in RANGES else None
    return ", ".join(f"`{each}`" for each in choices) if choices else rule or ""


def _readers(files: set[str]) -> list[str]:
    return sorted(file for file in files if not file.startswith("launch/")) or sorted(files)


def _choices(group: str) -> list[str]:
    """The named choices of a group. Those of `experiment` set too much for a cell."""
    folder, head = CONF / group, ["choice", "meaning", *(["sets"] if group != "experiment" else [])]
    rows = [
        [f"`{group}={file.relative_to(folder).with_suffix('').as_posix()}`", _cell(choice_meaning(file)), _sets(file)]
        for file in sorted(folder.rglob("*.yaml"))
    ]
    return [markdown([head, *(row[: len(head)] for row in rows)])]


def _sets(file: Path) -> str:
    """The fields that a choice sets, after the choices that it begins with."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    bases = []
    for base in content.pop("defaults", []):
        name = base if isinstance(base, str) else f"sampling={next(iter(base.values()))}"  # of a model's choice
        bases.append(name.removeprefix("/sampling/").removesuffix("@_here_"))
    return ", ".join(
        f"`{each}`" for each in [*bases, *(f"{name}={_written(value)}" for name, value in content.items())]
    )


def _cell(text: str) -> str:
    """Text for Markdown: signs outside of `code` are no markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\<*])", r"\\\1", part) for part in parts)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{_cell(text[1:])}."


def main(arguments: list[str]) -> None:
    with ending_in_one_line():
        Parser("launch.reference", __doc__).parse_args(arguments)
        with whole_file(PAGE) as file:
            file.write(page())
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
