"""Sampling settings that a checkpoint recommends, in place of defaults that the command line leaves."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from diffllm.checkpoint_source import CheckpointSource
from diffllm.generation_config import RECOMMENDED, recommended_sampling
from launch import CONF
from launch.idle import idle_settings
from sampling import SamplingConfig
from trainer.config import Config
from trainer.schema import resolve

# Choices of `sampling` by model_type, for published checkpoints.
BY_FAMILY = {"Dream": "dream", "llada": "llada", "sdar": "sdar", "Fast_dLLM_Qwen": "fast_dllm_v2"}


def resolve_recommended(config: DictConfig, overrides: Iterable[str], show: Callable[[str], object]) -> Config:
    """Resolve a composed tree with the sampling settings that its checkpoint recommends.

    Args:
        overrides: of the command line.
        show: takes the line that names the recommended settings, if there are some, before they are checked; and a
            line for each setting that does nothing.

    Raises:
        ValueError: see `recommend` and `resolve`.
    """
    line, lists = recommend(config, overrides)
    if line:
        show(line)
    resolved = resolve(config)
    resolved = replace(resolved, sampling=replace(resolved.sampling, **lists))
    for warning in idle_settings(resolved, overrides):
        show(warning)
    return resolved


def recommend(config: DictConfig, overrides: Iterable[str]) -> tuple[str | None, dict[str, list[str]]]:
    """Set the sampling settings of a composed tree that have their defaults to those of its checkpoint, in place.

    `sampling=CHOICE` and `sampling.FIELD=VALUE` on the command line win, as do the choices of other groups where they
    set something else than the default.

    Texts in lists are not set: OmegaConf would take `${…}` in them, which a stranger may have written, for a reference.

    Args:
        overrides: of the command line.

    Returns:
        A line that names the settings and their origin, None if there are none; and lists of texts to set when the
        tree is resolved.

    Raises:
        ValueError: no checkpoint in `model.path`, see `CheckpointSource.open`; or a reference in a setting.
    """
    chosen = {override.partition("=")[0].lstrip("+") for override in overrides}
    if config.model.path is None or "sampling" in chosen:
        return None, {}
    settings, origin = _settings(config.model.path)
    composed, defaults = OmegaConf.to_container(config.sampling), asdict(SamplingConfig())
    free = {
        name: value
        for name, value in settings.items()
        if f"sampling.{name}" not in chosen and composed.get(name, value) == defaults[name] != value
    }
    if not free:
        return None, {}
    lists = {name: _texts(value, f"{origin}: {name}") for name, value in free.items() if isinstance(value, list)}
    for name, value in free.items():
        if name not in lists:
            if "${" in str(value):
                raise ValueError(f"{origin}: {name}={value!r}: must be a name or a number")
            config.sampling[name] = value
    shown = " ".join(f"sampling.{name}={value}" for name, value in free.items())
    return f"sampling as {origin} recommends: {shown}", lists


def _texts(value: list[Any], where: str) -> list[str]:
    """The list, if it holds texts only.

    Raises:
        ValueError: another kind of value.
    """
    if not all(isinstance(text, str) for text in value):
        raise ValueError(f"{where}={value}: must be a list of texts")
    return value


def _settings(path: str) -> tuple[dict[str, Any], str]:
    """Recommended settings of a checkpoint, and where they come from."""
    source = CheckpointSource.open(path)
    if settings := recommended_sampling(source.generation):
        return settings, f"{path}/generation_config.json"
    for file in sorted((CONF / "model").glob("*.yaml")):
        if OmegaConf.load(file).get("path") == path:
            return _composed(f"model={file.stem}"), f"conf/model/{file.name}"
    if choice := BY_FAMILY.get(source.published.get("model_type")):
        return _composed(f"sampling={choice}"), f"conf/sampling/{choice}.yaml"
    return {}, path


def _composed(choice: str) -> dict[str, Any]:
    """Sampling settings of the tree with one choice."""
    sampling = OmegaConf.to_container(compose("config", [choice, "trainer.experiment_name=recommended"]).sampling)
    return {name: sampling[name] for name in RECOMMENDED}
