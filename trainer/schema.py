"""Read the tree of settings strictly, and compare two trees."""

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from os.path import expanduser
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from data import errors
from data.errors import nearest
from data.tasks import find_task
from diffllm import DiffusionConfig
from diffllm.diffusion import OBJECTIVES, ObjectiveConfig, settings_of
from sampling.config import unescape
from trainer.config import Config, to_dict


def tree(*objectives: type[ObjectiveConfig]) -> Iterator[tuple[str, Field]]:
    """Yield the dotted name and the field of each setting, groups included.

    Args:
        objectives: settings of the objectives that the group `diffusion` has.
    """
    for item in fields(Config):
        yield item.name, item
        for group in objectives if item.type is ObjectiveConfig else [item.type]:
            if is_dataclass(group):
                yield from ((f"{item.name}.{each.name}", each) for each in fields(group))


def field_names() -> list[str]:
    """Every dotted name, including the settings of all objectives."""
    objectives = [objective.settings for objective in OBJECTIVES.values()]
    return list(dict.fromkeys(name for name, _ in tree(*objectives)))


def resolve(composed: DictConfig) -> Config:
    """Checked dataclasses of the composed tree.

    A list of one may be written without brackets. `~` and the escapes of `sampling.config.unescape` are replaced: most
    shells pass both on as typed.

    Raises:
        ValueError: an unknown key, objective or task; a value of the wrong type or outside its range.
    """
    try:
        plain = OmegaConf.to_container(composed)
        objective = (plain.get("diffusion") or {}).get("objective", DiffusionConfig.objective)
        settings = settings_of(objective)
        for name, item in tree(settings):
            group, _, key = name.rpartition(".")
            owner = plain.get(group) if group else plain
            if item.type == list[str] and isinstance(owner, dict) and isinstance(owner.get(key), str):
                owner[key] = [owner[key]]
        schema = OmegaConf.structured(Config(diffusion=settings()))
        config = OmegaConf.to_object(OmegaConf.merge(schema, plain))
    except ConfigKeyError as error:
        if error.full_key in field_names():
            raise ValueError(
                f"{error.full_key}: diffusion.objective={objective} has no such setting; choose the objective that has "
                "it by diffusion=CHOICE"
            ) from error
        if error.full_key.partition(".")[0] == "experiment":
            raise ValueError("experiment: its file must begin with the line `# @package _global_`") from error
        raise ValueError(f"{error.full_key}: no such setting; {nearest(error.full_key, field_names())}") from error
    except OmegaConfBaseException as error:
        if "not a ListConfig" in error.msg:
            value = OmegaConf.select(composed, error.full_key)
            raise ValueError(f"{error.full_key}={value}: must be a list, such as [{value}]") from error
        raise ValueError(f"{error.full_key}: {error.msg.splitlines()[0]}") from error
    for name, item in tree(settings):
        group, _, key = name.rpartition(".")
        owner = getattr(config, group) if group else config
        setattr(owner, key, _as_meant(name, getattr(owner, key), item))
    for task in config.task.name:
        find_task(task)
    return config


def _as_meant(name: str, value: Any, item: Field) -> Any:
    if value is not None and item.metadata.get("path"):
        paths = value if isinstance(value, list) else [value]
        if wrong := [path for path in paths if not isinstance(path, str)]:
            raise ValueError(f"{name}={value}: {wrong[0]!r} is not the name of a file")
        return [*map(expanduser, paths)] if paths is value else expanduser(value)
    return unescape(name, value) if item.metadata.get("escapes") else value


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """Name each setting that must not differ when a run resumes, and differs from the saved one."""
    known = {name: item.metadata for name, item in tree(type(config.diffusion))}
    freedom = {name: metadata.get("free_when_resuming") for name, metadata in known.items()}

    def fixed(tree: dict[str, Any]) -> dict[str, Any]:
        values = {}
        for group, content in tree.items():
            leaves = {f"{group}.{name}": value for name, value in content.items()} if isinstance(content, dict) else {}
            values |= leaves or {group: content}
        return {name: value for name, value in values.items() if not is_free(name)}

    def is_free(name: str) -> bool:
        if config.model.path is not None and known.get(name, {}).get("from_scratch"):
            return True
        own = freedom.get(name)
        return bool(freedom.get(name.partition(".")[0]) if own is None else own)

    # A setting that an older version did not have has its default.
    return errors.differences(fixed(to_dict(Config())) | fixed(saved), fixed(to_dict(config)))
