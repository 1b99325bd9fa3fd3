"""Models from checkpoints, or from scratch."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from diffllm.config import ModelConfig
from diffllm.families import FAMILIES, Family, family_of
from diffllm.modeling_diffllm import DiffLLM


def load_model(
    path_or_name: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> DiffLLM:
    """Load a Dream or LLaDA checkpoint as published; no remote code runs.

    Args:
        path_or_name: a local directory or a hub id.

    Raises:
        ValueError: no checkpoint there, an unknown family, no mask token, or weights that are missing, unexpected or of
            another shape than config.json says.
    """
    source = str(path_or_name)
    published, family = _read_config(source)
    try:
        lm, report = family.model_class.from_pretrained(
            source,
            config=family.config(published),
            dtype=dtype,
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except ImportError as error:
        raise ValueError(_not_installed(attn_implementation)) from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model.path={source}: the weights cannot be read ({_first_line(error)})") from error
    check_weights(source, report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])
    return DiffLLM(lm, family, published)


def empty_model(
    path_or_name: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> DiffLLM:
    """The model of a checkpoint without its weights, which are on the meta device; buffers are real.

    Raises:
        ValueError: as `load_model`, as far as config.json goes.
    """
    published, family = _read_config(str(path_or_name))
    try:
        with torch.device("meta"):
            lm = family.model_class._from_config(
                family.config(published), dtype=dtype, attn_implementation=attn_implementation
            )
    except ImportError as error:
        raise ValueError(_not_installed(attn_implementation)) from error
    decoder = lm.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config)  # its frequencies are in no file
    return DiffLLM(lm, family, published)


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
        raise ValueError(f"{source}: the weights do not fit config.json. {'; '.join(problems)}")


def _read_config(source: str) -> tuple[dict[str, Any], Family]:
    """config.json of a checkpoint and its family."""
    try:
        published, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"model.path={source}: no readable config.json there ({_first_line(error)})") from error
    _check_ids(published, source)
    return published, family_of(published, source)


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            lm = family.model_class._from_config(
                family.config(published), attn_implementation=config.attn_implementation
            )
        except ImportError as error:
            raise ValueError(_not_installed(config.attn_implementation)) from error
    return DiffLLM(lm, family, published)


def _check_ids(published: dict[str, Any], source: str) -> None:
    """Refuse a config.json whose special tokens cannot serve.

    Raises:
        ValueError: no mask or end-of-sequence token, one beyond the vocabulary, or a mask that is the padding too.
    """
    if not isinstance(published, dict):
        raise ValueError(f"{source}: config.json is not a JSON object")
    for key in ("mask_token_id", "eos_token_id"):
        if published.get(key) is None:
            raise ValueError(f"{source}: config.json has no {key}, which a diffusion language model needs")
    for key in ("mask_token_id", "eos_token_id", "pad_token_id"):
        token = published.get(key)
        if token is not None and not 0 <= token < published.get("vocab_size", 0):
            raise ValueError(
                f"{source}: config.json has {key}={token}, outside vocab_size={published.get('vocab_size')}"
            )
    mask = published["mask_token_id"]
    if mask in (published.get("pad_token_id"), published["eos_token_id"]):
        raise ValueError(f"{source}: config.json uses token {mask} as mask and as padding or end")


def _not_installed(attn_implementation: str) -> str:
    return (
        f"model.attn_implementation={attn_implementation} is not installed: pip install 'diffllm[flash]', or use sdpa"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
