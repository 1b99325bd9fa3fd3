"""`diffusion_generate` with the arguments of Dream's published code, for every model that fills in masks."""

import warnings
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import partial
from inspect import signature
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from data.errors import nearest
from sampling import (
    LogitsHook,
    SampleOutput,
    SamplingConfig,
    StepEvent,
    Tokens,
    TokensHook,
    ids_without_token,
    sample,
)

SAMPLING = [item.name for item in fields(SamplingConfig)]
# Dream's own arguments and defaults; those of SamplingConfig have its defaults beside them.
DEFAULTS = {
    "max_new_tokens": 256,
    "max_length": None,
    "num_return_sequences": 1,
    "steps": 512,
    "alg": "origin",
    "alg_temp": None,
    "stop_at_eos": False,
    "seed": None,
    "batch_size": None,
    "output_history": False,
    "return_dict_in_generate": False,
    "mask_token_id": None,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}
KINDS = {
    int: ("a whole number", Integral),
    float: ("a number", Real),
    str: ("a text", str),
    bool: ("true or false", bool),
}
TYPES: dict[str, Any] = {item.name: item.type for item in fields(SamplingConfig)}
TYPES |= {"max_length": int, "num_return_sequences": int, "pad_token_id": int, "bos_token_id": int}
NULL_IS_A_VALUE = ("top_p", "top_k", "alg_temp", "block_length", "cache_refresh", "seed")


class DiffusionGeneration:
    """Adds `diffusion_generate` to a model. Refuses `generate`, which is autoregressive."""

    def denoiser(self) -> Any:
        """Return the `DiffLLM` that fills in masks."""
        return self

    def diffusion_generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | dict[str, Any] | Any = None,
        *,
        inputs: Tensor | None = None,
        generation_tokens_hook_func: TokensHook | None = None,
        generation_logits_hook_func: LogitsHook | None = None,
        streamer: BaseStreamer | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> SampleOutput | Tensor:
        """Generate by unmasking, with the arguments of Dream's `diffusion_generate` (arXiv 2508.15487).

        Two things differ from the published code. Confidence comes from the model's own distribution instead of the one
        after temperature and top-p (`confidence="scaled"` brings that back). Every step of `origin` unmasks the
        expected number of positions, in random order, where the published code draws the number too.

        Args:
            input_ids: [B, P] prompts, left-padded; masks in them are filled too. `inputs` is the published name.
            attention_mask: [B, P], 0 at the padding.
            generation_config: settings as an object, such as a `GenerationConfig`, or a dictionary; explicit ones win.
            generation_tokens_hook_func: `x = hook(step, x, logits)` after each step; first with (None, x, None).
            generation_logits_hook_func: `logits = hook(step, x, logits)` on [B, L, V] before anything is drawn.
            streamer: shows one row, such as Transformers' `TextDiffusionStreamer`, which shows every step.
            logits_processor: called with the canvases [N, L] and logits [N, V] of N masked positions.
            stopping_criteria: called for each token without masks before it, with the tokens up to it [1, n] and None
                for the scores. End-of-sequence tokens fill the rest of an ended row.
            tokenizer: only its ids are committed; needed only after `load_model`, which reads no tokenizer.
            settings: max_new_tokens (256), or max_length with the prompt; steps (512), alg (`origin`), alg_temp, eps,
                temperature, top_p, top_k; num_return_sequences of each prompt; return_dict_in_generate,
                output_history; mask_token_id and eos_token_id in place of the model's, pad_token_id to find padding
                without an attention_mask, bos_token_id, which is ignored; seed of the draws, by default drawn from
                torch's generator; and further fields of `sampling.SamplingConfig`, such as `block_length`.

        Returns:
            [B·num_return_sequences, L] tokens, or a `sampling.SampleOutput` if `return_dict_in_generate`.

        Raises:
            ValueError: an unknown setting, a wrong type or value; prompts that are not token ids, or an attention_mask
                of another shape; lengths that contradict each other or exceed the context; a streamer for several
                rows; or a hook that changes the shape.
        """
        model, known = self.denoiser(), _provided(settings)
        prompts = _check_prompts(input_ids, inputs, attention_mask, model.vocab_size)
        chosen, new_tokens = _choose(generation_config, known, prompts.shape[1])
        special = _special_tokens(model, chosen, tokenizer)
        input_ids, attention_mask = _copies(prompts, attention_mask, chosen)
        config = _sampling_config(chosen, new_tokens, len(input_ids))
        _check(model, config, input_ids, attention_mask, streamer)
        show = None
        if streamer is not None:
            streamer.put(input_ids.cpu())
            show = partial(_show_draft, streamer) if hasattr(streamer, "put_draft") else None
        output = sample(
            model,
            input_ids,
            config,
            special,
            attention_mask,
            history=chosen["output_history"],
            tokens_hook=generation_tokens_hook_func,
            logits_hook=generation_logits_hook_func,
            logits_processor=LogitsProcessorList(logits_processor) if logits_processor else None,
            criterion=partial(_ends, stopping_criteria, model.device) if stopping_criteria else None,
            on_step=show,
        )
        if streamer is not None:
            streamer.put(output.sequences[0, input_ids.shape[1] :].cpu())
            streamer.end()
        return output if chosen["return_dict_in_generate"] else output.sequences

    def generate(self, *_: Any, **__: Any) -> None:
        """Refuse to generate from left to right.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__}.generate: a diffusion language model does not generate from left to right; call "
            "diffusion_generate"
        )


def _check_prompts(
    input_ids: Tensor | None, inputs: Tensor | None, attention_mask: Tensor | None, vocab_size: int
) -> Tensor:
    """Check prompts and their attention mask. Return the prompts.

    Raises:
        ValueError: prompts that are not token ids [B, P], or a mask of another shape.
    """
    if (input_ids is None) == (inputs is None):
        raise ValueError("give the prompts once: input_ids, or inputs as the published code calls them")
    input_ids = inputs if input_ids is None else input_ids
    if (
        not isinstance(input_ids, Tensor)
        or input_ids.ndim != 2
        or not input_ids.numel()
        or input_ids.is_floating_point()
    ):
        found = f"shape {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids: must be a tensor of token ids [B, P], not {found}")
    if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
        raise ValueError(f"input_ids: {int(input_ids.max())} is no token below {vocab_size}")
    if not isinstance(attention_mask, Tensor | None):
        raise ValueError(f"attention_mask is {type(attention_mask).__name__}: name generation_config=… if it is that")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}: must be that of input_ids, {list(input_ids.shape)}"
        )
    return input_ids


def _copies(input_ids: Tensor, attention_mask: Tensor | None, chosen: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Repeat prompts and mask `num_return_sequences` times.

    Raises:
        ValueError: less than once.
    """
    pad, copies = chosen["pad_token_id"], chosen["num_return_sequences"]
    if attention_mask is None and pad is not None and (input_ids[:, 0] == pad).any():
        warnings.warn("input_ids begins with padding: give attention_mask, or it is attended", stacklevel=3)
    if copies < 1:
        raise ValueError(f"num_return_sequences={copies}: must be at least 1")
    mask = None if attention_mask is None else attention_mask.repeat_interleave(copies, 0)
    return input_ids.repeat_interleave(copies, 0), mask


def _choose(config: Any, explicit: dict[str, Any], prompt_length: int) -> tuple[dict[str, Any], int]:
    """Settings with their defaults, and the number of new tokens.

    Raises:
        ValueError: an unknown setting, or lengths that contradict each other.
    """
    provided = {}
    if isinstance(config, dict):
        provided = _provided(config)
    elif config is not None:
        values = config.to_diff_dict() if isinstance(config, GenerationConfig) else getattr(config, "__dict__", None)
        if values is None:
            raise ValueError(f"generation_config={config!r}: must be an object with settings, or a dictionary")
        provided = _provided({name: value for name, value in values.items() if name in DEFAULTS or name in SAMPLING})
        if "max_new_tokens" in provided:  # as in the published code, whose configuration always has a max_length
            provided.pop("max_length", None)
    new_tokens = DEFAULTS["max_new_tokens"]
    for source in (provided, explicit):
        new_tokens = _new_tokens(source, prompt_length, new_tokens)
    return DEFAULTS | provided | explicit, new_tokens


def _sampling_config(chosen: dict[str, Any], new_tokens: int, rows: int) -> SamplingConfig:
    """Settings of the sampler. Draw the seed from torch's generator if it is None."""
    seed = int(torch.randint(2**31, ())) if chosen["seed"] is None else chosen["seed"]
    derived = {
        "max_new_tokens": new_tokens,
        "alg_temp": chosen["alg_temp"] or 0.0,
        "seed": seed,
        "batch_size": chosen["batch_size"] or rows,
    }
    return SamplingConfig(**{name: chosen[name] for name in SAMPLING if name in chosen} | derived)


def _provided(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that are None, which stands for the default unless it is a value.

    Raises:
        ValueError: an unknown setting, or a wrong type.
    """
    known = list(dict.fromkeys([*DEFAULTS, *SAMPLING]))
    for name, value in settings.items():
        if name not in known:
            arguments = [*known, *signature(DiffusionGeneration.diffusion_generate).parameters]
            raise ValueError(f"diffusion_generate: no setting {name}; {nearest(name, arguments)}")
        kind = TYPES.get(name)
        kind = get_args(kind)[0] if isinstance(kind, UnionType) else kind  # int of int | None
        if value is not None and kind in KINDS and not isinstance(value, KINDS[kind][1]):
            raise ValueError(f"{name}={value!r}: must be {KINDS[kind][0]}")
    return {name: value for name, value in settings.items() if value is not None or name in NULL_IS_A_VALUE}


def _new_tokens(settings: dict[str, Any], prompt_length: int, default: int) -> int:
    if "max_length" not in settings:
        return settings.get("max_new_tokens", default)
    length = settings["max_length"]
    if length <= prompt_length:
        raise ValueError(f"max_length={length}: leaves nothing to fill in behind a prompt of {prompt_length} tokens")
    new_tokens = settings.get("max_new_tokens", length - prompt_length)
    if prompt_length + new_tokens != length:
        raise ValueError(
            f"max_length={length} and max_new_tokens={new_tokens} contradict each other behind a prompt of "
            f"{prompt_length} tokens: give one"
        )
    return new_tokens


def _special_tokens(model: Any, chosen: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Tokens:
    """Special tokens of the model, its tokenizer and the settings, which take precedence.

    Raises:
        ValueError: a token beyond the vocabulary, or a mask that is also the end.
    """
    special: Tokens = model.special_tokens
    mask, eos = special.mask, special.eos
    if chosen["mask_token_id"] is not None:
        mask = chosen["mask_token_id"]
    if (ends := chosen["eos_token_id"]) is not None:
        eos = tuple(ends) if isinstance(ends, Iterable) else (ends,)
    for name, tokens in (("mask_token_id", (mask,)), ("eos_token_id", eos)):
        for token in tokens:
            if type(token) is not int or not 0 <= token < model.vocab_size:
                raise ValueError(f"{name}={token!r}: must be a token below {model.vocab_size}")
    if mask in eos:
        raise ValueError(f"mask_token_id={mask}: is eos_token_id too")
    if tokenizer is not None:
        special = replace(special, forbidden=ids_without_token(tokenizer, model.vocab_size))
    return replace(special, mask=mask, eos=eos)


def _check(
    model: Any, config: SamplingConfig, input_ids: Tensor, attention_mask: Tensor | None, streamer: BaseStreamer | None
) -> None:
    """Refuse settings that do not go together.

    Raises:
        ValueError: prompts too long for the context, texts in the settings, or a streamer for several rows.
    """
    longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(-1).max())
    context = model.lm.config.max_position_embeddings
    if longest + config.max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={config.max_new_tokens} do not fit the model's context "
            f"of {context} tokens"
        )
    if config.stop or config.forbidden:
        raise ValueError("stop and forbidden are texts: give stopping_criteria and logits_processor instead")
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"streamer: shows one row, input_ids has {len(input_ids)}")


def _ends(criteria: StoppingCriteriaList, device: torch.device, tokens: np.ndarray) -> bool:
    return bool(StoppingCriteriaList(criteria)(torch.tensor(tokens, device=device)[None], None).any())


def _show_draft(streamer: BaseStreamer, event: StepEvent) -> None:
    streamer.put_draft(torch.from_numpy(event.tokens[event.prompt_length :]))
