"""The settings of train.py for the tools of this package, which have some of their own."""

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import TypeVar

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data.errors import nearest
from launch import CONF
from launch.arguments import check_arguments, name_tasks, quote_text, split_config_dir, warn_of_unread
from launch.cli import run_name
from launch.recommended import resolve_recommended
from trainer.config import Config
from trainer.schema import field_names, resolve

GROUP = "launch"  # of the settings of tools that load a model
READS = ("model", "sampling")  # groups of theirs beside it
Own = TypeVar("Own")


def read_settings(
    arguments: Sequence[str], own: Sequence[str] = (), recommended: set[str] | None = None
) -> tuple[dict[str, str], Config, str]:
    """Values of a tool's own settings, the settings of train.py, and the choice of the group `model`.

    Args:
        own: names of the tool's own settings.
        recommended: gets the line of `resolve_recommended`; None leaves the sampling settings as they are.

    Raises:
        ValueError: an unknown name, a value outside its range, or see `check_arguments` and `resolve_recommended`.
    """
    directory, others = split_config_dir([*map(quote_text, arguments)])
    values, settings, names = {}, [], field_names()
    for argument in others:
        name, equals, value = argument.partition("=")
        if name in own and equals:
            values[name] = value
        elif name not in names and (get_close_matches(name, own) or name in [each.rpartition(".")[2] for each in own]):
            raise ValueError(f"{argument}: no such setting; {nearest(name, own)}")
        elif not equals:
            raise ValueError(f"{argument}: write settings as NAME=VALUE; --help explains them")
        else:
            settings.append(argument)
    options = [f"--config-dir={directory}"] if directory else []
    check_arguments([*options, *settings])
    search = [f"hydra.searchpath=[file://{directory.resolve()}]"] if directory else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", [*search, *name_tasks(settings)], return_hydra_config=True)
        with open_dict(composed):
            hydra = composed.pop("hydra")
        if OmegaConf.is_interpolation(composed.trainer, "experiment_name"):  # which hydra.main alone resolves
            composed.trainer.experiment_name = run_name(hydra.job.override_dirname)
        config = resolve(composed) if recommended is None else resolve_recommended(composed, settings, recommended.add)
    return values, config, hydra.runtime.choices.model


def read_own_settings(command: str, schema: type[Own], arguments: Sequence[str]) -> tuple[Own, Config, set[str]]:
    """Settings `launch.NAME` of a tool that loads a model, those of sample.py, and lines on recommended ones.

    Args:
        command: the tool's module.
        schema: dataclass of the tool's settings, which names them as `launch.NAME` in its errors.

    Raises:
        ValueError: an unknown name, a value outside its range, or see `read_settings` and `refuse_one_answer`.
    """
    lines: set[str] = set()
    values, config, _ = read_settings(arguments, own_names(schema), lines)
    refuse_one_answer(command, config)
    warn_of_unread(command, [quote_text(each) for each in arguments if not each.startswith(f"{GROUP}.")], READS)
    try:
        own = {name.partition(".")[2]: value for name, value in values.items()}
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), own)), config, lines
    except OmegaConfBaseException as error:
        name = f"{GROUP}.{error.full_key}"
        raise ValueError(f"{name}={values[name]}: {error.msg.splitlines()[0]}") from error


def refuse_one_answer(command: str, config: Config) -> None:
    """Refuse settings of sample.py for one answer, which a chat, page or server does not read.

    Raises:
        ValueError: one is given.
    """
    for name in ("prompt", "template", "input", "output", "record"):
        if (value := getattr(config, name)) is not None:
            raise ValueError(f"{name}={value}: {command} does not read it, leave it out")


def own_names(schema: type) -> list[str]:
    """Names of a tool's settings as they are written."""
    return [f"{GROUP}.{item.name}" for item in fields(schema)]


def whole_number(name: str, value: str | None, default: int) -> int:
    """The value of a tool's own setting, or the default.

    Raises:
        ValueError: not a whole number below a million.
    """
    if value is not None and not (value.isdecimal() and len(value) < 7):
        raise ValueError(f"{name}={value}: must be a whole number below a million")
    return default if value is None else int(value)
