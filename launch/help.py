"""The help of the root scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import groupby
from shutil import get_terminal_size
from textwrap import fill

from launch.meanings import EXPERIMENT, meanings
from trainer.config import Config

MORE = """\
GROUP.FIELD=VALUE sets a field. conf/README.md lists all fields and choices, with types, defaults and meanings;
`--cfg job` prints the settings of a command line. --config-dir DIR adds choices of your own. -m A=1,2 runs once for
each value; other ways to sweep, with the extra `sweep`: hydra/launcher=joblib, submitit_local or submitit_slurm,
hydra/sweeper=optuna."""


def help_text(documentation: str, script: str, reads: Sequence[str], choices: Mapping[str, Sequence[str]]) -> str:
    """Describe a script, and the groups and settings that it reads.

    Args:
        documentation: docstring of the script.
        script: its name.
        reads: names of groups and settings.
        choices: named choices of each group.
    """
    width = min(get_terminal_size().columns, 120)
    groups = {item.name: item.type for item in fields(Config) if is_dataclass(item.type)}
    known = meanings(Config) | {"experiment": EXPERIMENT}
    for group, schema in groups.items():
        known |= {f"{group}.{name}": meaning for name, meaning in meanings(schema).items()}
    column = max(map(len, reads)) + 4

    def entry(name: str, text: str) -> str:
        return fill(text, width, initial_indent=f"  {name}".ljust(column), subsequent_indent=" " * column)

    settings = [entry(name, known[name].removeprefix(f"{script}: ")) for name in reads if name not in groups]
    read = ["experiment", *(name for name in reads if name in groups)]
    named = [f"{entry(name, known[name])}\n{entry('', _folded(choices[name]))}" for name in read]
    parts = ["Settings:", "\n".join(settings), "Groups (GROUP=CHOICE):", "\n".join(named), fill(MORE, width)]
    return "\n\n".join([documentation.strip(), *parts])


def _folded(choices: Sequence[str]) -> str:
    """Names of choices, those of a folder as FOLDER/{NAME, NAME}."""
    split = sorted(choice.rpartition("/") for choice in choices)
    texts = []
    for folder, members in groupby(split, key=lambda parts: parts[0]):
        names = ", ".join(name for _, _, name in members)
        texts.append(f"{folder}/{{{names}}}" if folder else names)
    return ", ".join(texts)
