"""Sampling settings that a checkpoint recommends, in place of defaults that the command line leaves."""

from collections.abc import Iterable
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from diffllm.checkpoint_source import CheckpointSource
from diffllm.generation_config import RECOMMENDED, recommended_sampling
from launch import CONF
from sampling import SamplingConfig

BY_FAMILY = {"Dream": "dream", "llada": "llada"}  # choices of `sampling` by model_type, for published checkpoints


def recommend(config: DictConfig, overrides: Iterable[str]) -> str | None:
    """Set the sampling settings of a composed tree that have their defaults to those of its checkpoint, in place.

    `sampling=CHOICE` and `sampling.FIELD=VALUE` on the command line win, as do the choices of other groups where they
    set something else than the default.

    Args:
        overrides: of the command line.

    Returns:
        A line that names the settings and their origin, or None if nothing was set.

    Raises:
        ValueError: no checkpoint in `model.path`, see `CheckpointSource.open`.
    """
    chosen = {override.partition("=")[0].lstrip("+") for override in overrides}
    if config.model.path is None or "sampling" in chosen:
        return None
    settings, origin = _settings(config.model.path)
    defaults = OmegaConf.structured(SamplingConfig)
    free = [
        name
        for name, value in settings.items()
        if f"sampling.{name}" not in chosen and config.sampling[name] == defaults[name] != value
    ]
    for name in free:
        config.sampling[name] = settings[name]
    if not free:
        return None
    shown = " ".join(f"sampling.{name}={settings[name]}" for name in free)
    return f"sampled as {origin} recommends: {shown}"


def _settings(path: str) -> tuple[dict[str, Any], str]:
    """Recommended settings of a checkpoint, and where they come from."""
    source = CheckpointSource.open(path)
    if settings := recommended_sampling(source.generation):
        escaped = {name: _escaped(value) for name, value in settings.items()}
        return escaped, f"{path}/generation_config.json"
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


def _escaped(value: Any) -> Any:
    """Texts as they are written in YAML, where a backslash begins an escape."""
    return [text.replace("\\", "\\\\") for text in value] if isinstance(value, list) else value
