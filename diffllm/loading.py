"""Models from checkpoints, or from scratch."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GgufConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from data.storage import first_line
from diffllm.config import ModelConfig
from diffllm.families import FAMILIES, Family, family_of
from diffllm.modeling_diffllm import DiffLLM
from diffllm.sources import is_gguf, local, on_hub, readable, split_gguf, unexpected_in_gguf

ROPE = ("rope_scaling", "rope_parameters")
ROPE_ALIASES = ("default", "su", "mrope")  # which some configurations have, and Transformers takes as another
ROPE_WITH_FACTOR = ("linear", "dynamic", "yarn", "llama3")
JSON = {str: "text", dict: "an object"}
HEAD_OF_ITS_OWN = (
    "{}: config.json has tie_word_embeddings=true, but the head in the file is not the embedding; set it to false"
)


def load_model(
    path_or_name: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> DiffLLM:
    """Load a diffusion checkpoint, published or adapted; no remote code runs.

    Args:
        path_or_name: a local directory or a hub id.

    Raises:
        ValueError: no checkpoint there, an unknown family, no mask token (an autoregressive checkpoint: see
            `diffllm.adapt`), or weights that are missing, unexpected or of another shape than config.json says.
    """
    source = local(path_or_name)
    published, family = read_config(source)
    check_ids(published, source)
    return DiffLLM(load_decoder(source, published, family, dtype, attn_implementation), family, published, source)


def empty_model(
    path_or_name: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> DiffLLM:
    """The model of a checkpoint without its weights, which are on the meta device; buffers are real.

    Raises:
        ValueError: as `load_model`, as far as config.json goes.
    """
    source = local(path_or_name)
    published, family = read_config(source)
    check_ids(published, source)
    lm = _on_meta(source, published, family, dtype, attn_implementation)
    fill_buffers(lm)
    return DiffLLM(lm, family, published, source)


def _on_meta(
    source: str, published: dict[str, Any], family: Family, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    with _building(source, attn_implementation), torch.device("meta"):
        config = family.config(published)
        if unknown := set(getattr(config, "layer_types", None) or ()) - {*ALLOWED_LAYER_TYPES}:
            raise ValueError(f"layer_types has {', '.join(map(repr, sorted(unknown)))}")
        return family.model_class._from_config(config, dtype=dtype, attn_implementation=attn_implementation)


@torch.no_grad()
def fill_buffers(lm: PreTrainedModel) -> None:
    """Make the buffers of a model on the meta device real: rotary frequencies, scales and the like are in no file."""
    holders = set()
    for name, buffer in list(lm.named_non_persistent_buffers()):
        path, _, own_name = name.rpartition(".")
        holders.add(module := lm.get_submodule(path))
        setattr(module, own_name, torch.empty_like(buffer, device="cpu"))
    for module in holders:
        lm._init_weights(module)  # as Transformers does when it reads weights; those on meta take no value


def load_decoder(
    source: str, published: dict[str, Any], family: Family, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """The decoder of a checkpoint with its weights.

    Raises:
        ValueError: see `load_model`.
    """
    directory, file = split_gguf(source)
    settings = {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True)} if file else {}
    _on_meta(source, published, family, torch.float32, attn_implementation)  # what fails now is not the weights' fault
    unexpected = unexpected_in_gguf(source) if file else []
    with readable(source, "the weights"):
        lm, report = family.model_class.from_pretrained(
            directory,
            config=family.config(published),
            dtype=dtype,
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **settings,
        )
    unexpected += report["unexpected_keys"]
    check_weights(source, report["missing_keys"], unexpected, report["mismatched_keys"])
    if lm.config.tie_word_embeddings and lm.get_output_embeddings().weight is not lm.get_input_embeddings().weight:
        raise ValueError(HEAD_OF_ITS_OWN.format(source))
    return lm


def check_weights(
    source: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]]
) -> None:
    """Refuse weights that are not those of config.json.

    Args:
        mismatched: (name, shape in the file, shape by the config).

    Raises:
        ValueError: naming all of them.
    """
    shapes = [f"{name} is {tuple(there)} in the file, {tuple(here)} by the config" for name, there, here in mismatched]
    problems = [
        f"{kind}: {', '.join(sorted(names))}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        settings = "what the file says of itself" if is_gguf(source) else "config.json"
        raise ValueError(f"{source}: the weights do not fit {settings}. {'; '.join(problems)}")


def read_config(source: str) -> tuple[dict[str, Any], Family]:
    """config.json of a checkpoint, or what a GGUF file says in its place, and its family.

    Raises:
        ValueError: there is none, or its `model_type` is of no family.
    """
    directory, file = split_gguf(source)
    with readable(source, "config.json"):
        published, _ = PreTrainedConfig.get_config_dict(directory, gguf_file=file)
        if not published:
            raise OSError("it is empty, or there is none")
    if not isinstance(published, dict):
        raise ValueError(f"{source}: config.json is not a JSON object")
    check_values(published, source)
    family = family_of(published, source)
    if file:
        published = {key: value for key, value in published.items() if not key.startswith("_")}
        published = {"architectures": [family.architecture], **published}
    if "auto_map" in published and not Path(source).is_dir():
        published["auto_map"] = on_hub(published["auto_map"], source)
    return published, family


def check_values(published: dict[str, Any], source: str) -> None:
    """Refuse values of a config.json that Transformers would take, or whose error would not name them.

    Raises:
        ValueError: naming the key and its value.
    """
    for key, value in _numbers(published):
        if not math.isfinite(value):
            raise ValueError(f"{source}: config.json has {key}={value}: must be a finite number")
    for key, kind in (("model_type", str), ("auto_map", dict), *((key, dict) for key in ROPE)):
        if not isinstance(value := published.get(key), kind | None):
            raise ValueError(f"{source}: config.json has {key}={value!r}: must be {JSON[kind]}")
    for key in ROPE:
        rope = published.get(key) or {}
        layers = [part for part in rope.values() if isinstance(part, dict)]  # each kind of layer may have its own
        for settings in layers or [rope]:
            _check_rope(settings, f"{source}: config.json has {key}={rope}")


def _check_rope(rope: dict[str, Any], what: str) -> None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in (*ROPE_INIT_FUNCTIONS, *ROPE_ALIASES):
        raise ValueError(f"{what}: rope_type must be one of default, {', '.join(ROPE_INIT_FUNCTIONS)}")
    factor = rope.get("factor")
    wanted = kind in ROPE_WITH_FACTOR or factor is not None
    if wanted and not (isinstance(factor, int | float) and not isinstance(factor, bool) and factor > 0):
        raise ValueError(f"{what}: factor must be a positive number")


def _numbers(published: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the floats of nested objects and lists, each with the key at the top."""
    parts = list(published.items())
    while parts:
        key, value = parts.pop()
        if isinstance(value, dict | list):
            parts += [(key, part) for part in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, float):
            yield key, value


def new_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> DiffLLM:
    """A model from scratch in the shape that `config` gives, the same for the same seed.

    Raises:
        ValueError: `model.vocab_size` is smaller than the tokenizer.
    """
    vocab_size = config.vocab_size or len(tokenizer)
    if vocab_size < len(tokenizer):
        raise ValueError(
            f"model.vocab_size={vocab_size}: the tokenizer has {len(tokenizer)} tokens, give at least that"
        )
    family = FAMILIES[config.family]
    published = family.published_config(
        {
            "vocab_size": vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "max_position_embeddings": config.max_position_embeddings,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": config.rope_theta,
            "initializer_range": config.initializer_range,
            "tie_word_embeddings": config.tie_word_embeddings,
            "mask_token_id": tokenizer.mask_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    with torch.random.fork_rng(devices=[]), _building("model", config.attn_implementation):
        torch.manual_seed(seed)
        lm = family.model_class._from_config(family.config(published), attn_implementation=config.attn_implementation)
    model = DiffLLM(lm, family, published)
    model.set_tokenizer(tokenizer)
    return model


def check_ids(published: dict[str, Any], source: str) -> None:
    """Refuse a config.json whose special tokens cannot serve.

    Raises:
        ValueError: no mask or end-of-sequence token, one beyond the vocabulary, or a mask that is the padding too.
    """
    if published.get("mask_token_id") is None:
        raise ValueError(
            f"{source}: config.json has no mask_token_id, which a diffusion language model needs; "
            "`python -m diffllm.adapt SOURCE DIR` gives one to an autoregressive checkpoint"
        )
    if published.get("eos_token_id") is None:
        raise ValueError(f"{source}: config.json has no eos_token_id, which a diffusion language model needs")
    for key in ("mask_token_id", "eos_token_id", "pad_token_id"):
        token = published.get(key)
        size = published.get("vocab_size")
        if token is not None and not (type(token) is type(size) is int and 0 <= token < size):
            raise ValueError(f"{source}: config.json has {key}={token}, which is no token below vocab_size={size}")
    mask = published["mask_token_id"]
    if mask in (published.get("pad_token_id"), published["eos_token_id"]):
        raise ValueError(f"{source}: config.json uses token {mask} as mask and as padding or end")


@contextmanager
def _building(source: str, attn_implementation: str) -> Iterator[None]:
    """Say what is at fault where Transformers cannot make a model of its settings."""
    try:
        yield
    except (OSError, SafetensorError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        if "flash" not in attn_implementation:
            raise ValueError(f"{source}: {first_line(error)}") from error
        raise ValueError(
            f"model.attn_implementation={attn_implementation} is not installed: pip install 'diffllm[flash]', "
            "or use sdpa"
        ) from error
    except Exception as error:  # it takes values as they come: nonsense ends in whatever fails first
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{source}: config.json does not describe a model that can be made ({reason})") from error
