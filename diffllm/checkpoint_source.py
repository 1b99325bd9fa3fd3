"""Place, config.json and family of a checkpoint; config.json is read and checked once."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from diffllm.checkpoint_errors import readable
from diffllm.families import FAMILIES, Family, family_of
from diffllm.gguf import is_gguf, split_gguf

ROPE = ("rope_scaling", "rope_parameters")
ROPE_ALIASES = ("default", "su", "mrope")  # of older configurations; Transformers knows them
ROPE_WITH_FACTOR = ("linear", "dynamic", "yarn", "llama3")
JSON = {str: "text", dict: "an object"}


@dataclass(frozen=True)
class CheckpointSource:
    """Place, config.json and family of a checkpoint.

    Attributes:
        name: a local directory, a hub id or a GGUF file; None for a model from scratch.
        published: its config.json, or the metadata of a GGUF file in Transformers' keys.
        family: the format that `model_type` names.
    """

    name: str | None
    published: dict[str, Any]
    family: Family

    @classmethod
    def open(cls, source: "str | Path | CheckpointSource") -> "CheckpointSource":
        """Read and check config.json. Return a `CheckpointSource` unchanged.

        Raises:
            ValueError: no checkpoint, an unknown family, or a wrong value in config.json.
        """
        if isinstance(source, CheckpointSource):
            return source
        name = os.path.expanduser(source)
        directory, file = split_gguf(name)
        with readable(name, "config.json"):
            published, _ = PreTrainedConfig.get_config_dict(directory, gguf_file=file)
            if not published:
                raise OSError("it is empty or missing")
        if not isinstance(published, dict):
            raise ValueError(f"{name}: config.json is not a JSON object")
        check_values(published, name)
        family = family_of(published, name)
        published |= {key: value for key, value in family.defaults.items() if published.get(key) is None}
        _check_block_length(published, family, name)
        if file:
            published = {key: value for key, value in published.items() if not key.startswith("_")}
            published = {"architectures": [family.architecture], **published}
        if "auto_map" in published and not Path(name).is_dir():
            published["auto_map"] = on_hub(published["auto_map"], name)
        return cls(name, published, family)

    @property
    def is_autoregressive(self) -> bool:
        """Whether the checkpoint must be adapted: a causal decoder without a mask token, or a GGUF file."""
        has_mask = self.published.get("mask_token_id") is not None or self.family in FAMILIES.values()
        return is_gguf(self.name) or not has_mask

    def as_causal(self) -> "CheckpointSource":
        """The same decoder in the format of Transformers' causal models, which has no mask."""
        model_type = self.family.model_class.config_class.model_type
        family = family_of({"model_type": model_type}, model_type)
        own = ("mask_token_id", self.family.block_key, "auto_map")
        kept = {key: value for key, value in self.published.items() if key not in own}
        named = {"model_type": model_type, "architectures": [family.architecture]}
        return replace(self, published=kept | named, family=family)

    @cached_property
    def generation(self) -> dict[str, Any]:
        """generation_config.json, empty without one.

        Raises:
            ValueError: it is not a JSON object, or its eos_token_id is neither a token nor a list of tokens.
        """
        if self.name is None or is_gguf(self.name):
            return {}
        with readable(self.name, GENERATION_CONFIG_NAME):
            file = cached_file(
                self.name,
                GENERATION_CONFIG_NAME,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            settings = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
        if not isinstance(settings, dict):
            raise ValueError(f"{self.name}: {GENERATION_CONFIG_NAME} is not a JSON object")
        ends = settings.get("eos_token_id")
        if not all(type(token) is int for token in (ends if isinstance(ends, list) else [ends]) if token is not None):
            raise ValueError(
                f"{self.name}: {GENERATION_CONFIG_NAME} has eos_token_id={ends!r}: must be a token, or a list"
            )
        return settings

    def check_ids(self) -> None:
        """Refuse special tokens that do not suit a diffusion model.

        Raises:
            ValueError: no mask or end of sequence, a token beyond the vocabulary, or a mask that is also padding or
                end.
        """
        published, name = self.published, self.name or "the model"
        if published.get("mask_token_id") is None:
            raise ValueError(
                f"{name}: config.json has no mask_token_id, which a diffusion language model needs; "
                "`python -m diffllm.adapt SOURCE DIR` gives one to an autoregressive checkpoint"
            )
        if published.get("eos_token_id") is None:
            raise ValueError(f"{name}: config.json has no eos_token_id, which a diffusion language model needs")
        for key in ("mask_token_id", "eos_token_id", "pad_token_id"):
            token = published.get(key)
            size = published.get("vocab_size")
            if token is not None and not (type(token) is type(size) is int and 0 <= token < size):
                raise ValueError(f"{name}: config.json has {key}={token}, which is no token below vocab_size={size}")
        mask = published["mask_token_id"]
        if mask in (published.get("pad_token_id"), published["eos_token_id"]):
            raise ValueError(f"{name}: config.json uses token {mask} as mask and as padding or end")


def on_hub(auto_map: dict[str, Any], repository: str) -> dict[str, Any]:
    """An `auto_map` whose classes are named with their repository, `REPOSITORY--file.Class`."""

    def full(name: Any) -> Any:
        if isinstance(name, list):
            return [full(part) for part in name]
        return name if name is None or "--" in name else f"{repository}--{name}"

    return {auto: full(name) for auto, name in auto_map.items()}


def check_values(published: dict[str, Any], name: str) -> None:
    """Refuse values of a config.json that Transformers accepts, or refuses without naming them.

    Raises:
        ValueError: the message names key and value.
    """
    for key, value in _numbers(published):
        if not math.isfinite(value):
            raise ValueError(f"{name}: config.json has {key}={value}: must be a finite number")
    for key, kind in (("model_type", str), ("auto_map", dict), *((key, dict) for key in ROPE)):
        if not isinstance(value := published.get(key), kind | None):
            raise ValueError(f"{name}: config.json has {key}={value!r}: must be {JSON[kind]}")
    for key in ROPE:
        rope = published.get(key) or {}
        layers = [part for part in rope.values() if isinstance(part, dict)]  # layer types may have their own
        for settings in layers or [rope]:
            _check_rope(settings, f"{name}: config.json has {key}={rope}")


def _check_block_length(published: dict[str, Any], family: Family, name: str) -> None:
    length = published.get(family.block_key)
    if length is not None and not (type(length) is int and length > 0):
        raise ValueError(f"{name}: config.json has {family.block_key}={length!r}: must be a positive whole number")


def _check_rope(rope: dict[str, Any], where: str) -> None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in (*ROPE_INIT_FUNCTIONS, *ROPE_ALIASES):
        raise ValueError(f"{where}: rope_type must be one of default, {', '.join(ROPE_INIT_FUNCTIONS)}")
    factor = rope.get("factor")
    wanted = kind in ROPE_WITH_FACTOR or factor is not None
    if wanted and not (isinstance(factor, int | float) and not isinstance(factor, bool) and factor > 0):
        raise ValueError(f"{where}: factor must be a positive number")


def _numbers(published: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the floats of nested objects and lists, each with the key at the top."""
    parts = list(published.items())
    while parts:
        key, value = parts.pop()
        if isinstance(value, dict | list):
            parts += [(key, part) for part in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, float):
            yield key, value
