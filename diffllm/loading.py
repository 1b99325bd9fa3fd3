"""Load models from checkpoints, or make them from scratch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

from data.storage import first_line
from diffllm.attention import attention_for
from diffllm.checkpoint_errors import readable
from diffllm.checkpoint_source import CheckpointSource
from diffllm.config import ModelConfig
from diffllm.families import FAMILIES
from diffllm.gguf import is_gguf, read_header, split_gguf, unknown_tensors
from diffllm.modeling_diffllm import DiffLLM

HEAD_OF_ITS_OWN = (
    "{}: config.json has tie_word_embeddings=true, but the head in the file is not the embedding; set it to false"
)


def load_model(
    path_or_name: str | Path | CheckpointSource,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
) -> DiffLLM:
    """Load a diffusion checkpoint, published or adapted, without remote code.

    Args:
        path_or_name: a local directory or a hub id.

    Raises:
        ValueError: no checkpoint, an unknown family, no mask token (for an autoregressive checkpoint see
            `diffllm.adapt`), or weights that are missing, unexpected or of another shape than in config.json.
    """
    source = CheckpointSource.open(path_or_name)
    source.check_ids()
    return DiffLLM(load_decoder(source, dtype, attn_implementation), source)


def empty_model(
    path_or_name: str | Path | CheckpointSource,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
) -> DiffLLM:
    """The model of a checkpoint with its weights on the meta device; buffers are real.

    Raises:
        ValueError: errors of config.json, as in `load_model`.
    """
    source = CheckpointSource.open(path_or_name)
    source.check_ids()
    lm = decoder_on_meta(source, dtype, attn_implementation)
    fill_buffers(lm)
    return DiffLLM(lm, source)


def decoder_on_meta(
    source: CheckpointSource, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """The decoder of a checkpoint on the meta device.

    Raises:
        ValueError: config.json does not describe one.
    """
    with building(source.name, attn_implementation), torch.device("meta"):
        config = source.family.config(source.published)
        if unknown := set(getattr(config, "layer_types", None) or ()) - {*ALLOWED_LAYER_TYPES}:
            raise ValueError(f"layer_types has {', '.join(map(repr, sorted(unknown)))}")
        return source.family.model_class._from_config(config, dtype=dtype, attn_implementation=attn_implementation)


@torch.no_grad()
def fill_buffers(lm: PreTrainedModel) -> None:
    """Compute the buffers of a model on the meta device; no file has them, such as rotary frequencies."""
    holders = set()
    for name, buffer in list(lm.named_non_persistent_buffers()):
        path, _, own_name = name.rpartition(".")
        holders.add(module := lm.get_submodule(path))
        setattr(module, own_name, torch.empty_like(buffer, device="cpu"))
    for module in holders:
        lm._init_weights(module)  # as Transformers does; weights on meta ignore it


def load_decoder(source: CheckpointSource, dtype: torch.dtype | str, attn_implementation: str) -> PreTrainedModel:
    """The decoder of a checkpoint with its weights.

    Raises:
        ValueError: see `load_model`.
    """
    directory, file = split_gguf(source.name)
    settings = {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True)} if file else {}
    decoder_on_meta(source, torch.float32, attn_implementation)  # config errors are raised before the weights are read
    unexpected = _unknown_in_gguf(source.name) if file else []
    with readable(source.name, "the weights"):
        lm, report = source.family.model_class.from_pretrained(
            directory,
            config=source.family.config(source.published),
            dtype=dtype,
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **settings,
        )
    unexpected += report["unexpected_keys"]
    check_weights(source.name, report["missing_keys"], unexpected, report["mismatched_keys"])
    if lm.config.tie_word_embeddings and lm.get_output_embeddings().weight is not lm.get_input_embeddings().weight:
        raise ValueError(HEAD_OF_ITS_OWN.format(source.name))
    return lm


def _unknown_in_gguf(name: str) -> list[str]:
    with readable(name, "the file"):
        header = read_header(name)
    return unknown_tensors(header, name)


def check_weights(
    source: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]]
) -> None:
    """Refuse weights that do not fit config.json.

    Args:
        mismatched: (name, shape in the file, shape by config.json).

    Raises:
        ValueError: the message names all of them.
    """
    shapes = [f"{name} is {tuple(found)} in the file, {tuple(due)} by the config" for name, found, due in mismatched]
    problems = [
        f"{kind}: {', '.join(sorted(names))}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        settings = "the metadata of the file" if is_gguf(source) else "config.json"
        raise ValueError(f"{source}: the weights do not fit {settings}. {'; '.join(problems)}")


def new_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> DiffLLM:
    """A model from scratch with the shape of `config` and weights drawn from `seed`.

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
    attention = attention_for(config.attn_implementation)
    with torch.random.fork_rng(devices=[]), building("model", attention):
        torch.manual_seed(seed)
        lm = family.model_class._from_config(family.config(published), attn_implementation=attention)
    model = DiffLLM(lm, CheckpointSource(None, published, family))
    model.set_tokenizer(tokenizer)
    return model


@contextmanager
def building(name: str, attn_implementation: str = "sdpa") -> Iterator[None]:
    """Turn errors of building a model from its config into a ValueError that names checkpoint and cause."""
    try:
        yield
    except (OSError, SafetensorError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        if "flash" not in attn_implementation:
            raise ValueError(f"{name}: {first_line(error)}") from error
        raise ValueError(
            f"model.attn_implementation={attn_implementation} is not installed: pip install 'diffllm[flash]', "
            "or use sdpa"
        ) from error
    except Exception as error:  # config values are not checked: a wrong one raises any error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{name}: config.json does not describe a model that can be built ({reason})") from error
