"""generation_config.json: special tokens, and the sampling settings that a model was validated with."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from sampling import SamplingConfig

RUN_ONLY = ("batch_size", "compile", "seed")  # fields of SamplingConfig that say nothing about a model
RECOMMENDED = [item.name for item in fields(SamplingConfig) if item.name not in RUN_ONLY]


def generation_json(
    generation: Mapping[str, Any], tokens: Mapping[str, Any], sampling: SamplingConfig | None, use_cache: bool = False
) -> dict[str, Any]:
    """The content of generation_config.json.

    Args:
        generation: of the source.
        tokens: special tokens; None values are left out.
        sampling: settings to keep, by their names in SamplingConfig; None keeps those of the source.
        use_cache: whether `generate` keeps states. In a bidirectional model later tokens change earlier states.
    """
    settings = {name: value for name, value in generation.items() if name != "cache_implementation"}
    if sampling is not None:
        kept = {name: value for name, value in asdict(sampling).items() if name in RECOMMENDED and value is not None}
        others = {name: value for name, value in settings.items() if name not in RECOMMENDED}
        if sampling.temperature:
            kept["do_sample"] = True
        else:  # Transformers warns of a temperature of 0
            del kept["temperature"]
        settings = others | kept
    return settings | {"use_cache": use_cache} | {name: token for name, token in tokens.items() if token is not None}


def recommended_sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling settings of a generation_config.json, empty if it has no `alg`.

    The file may hold settings of autoregressive decoding under the same names, such as `temperature`.
    """
    if "alg" not in generation:
        return {}
    # Older exports say cache: none, their default. A model that attends by blocks has an exact cache.
    given = {name: value for name, value in generation.items() if (name, value) != ("cache", "none")}
    return {name: given[name] for name in RECOMMENDED if given.get(name) is not None}
