"""Settings of a command line that do nothing, given the others."""

from collections.abc import Iterable, Iterator

from trainer.config import Config
from trainer.schema import tree


def idle_settings(config: Config, overrides: Iterable[str]) -> Iterator[str]:
    """Yield a line for each setting that only others would let have an effect.

    Args:
        overrides: of the command line, such as `sampling.threshold=0.9`.
    """
    known, defaults = dict(tree(type(config.diffusion))), Config()
    for override in overrides:
        name = override.partition("=")[0].lstrip("+")
        if name not in known:
            continue
        group, _, field = name.rpartition(".")
        if group and getattr(getattr(config, group), field) == getattr(getattr(defaults, group), field, None):
            continue  # `=null` undoes the value of a choice
        if known[name].metadata.get("from_scratch") and config.model.path is not None:
            yield f"warning: {override} does nothing: config.json of model.path={config.model.path} decides"
        for other, values in (known[name].metadata.get("used_with") or {}).items():
            value = getattr(getattr(config, group), other)
            if not (value in values if values else value):
                meant = " or ".join(f"{group}.{other}={each}" for each in values) or f"{group}.{other}"
                yield f"warning: {override} does nothing without {meant}"
