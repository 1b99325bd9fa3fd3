"""Text in, text out: sample responses to prompts of token ids."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from data import turn_end
from diffllm.modeling_diffllm import DiffLLM
from sampling import Canvas, SampledRow, SamplingConfig, Tokens, fill, ids_without_token


@dataclass
class Response:
    """A response to a prompt, or one that was chosen or filled in (`diffllm.answers`)."""

    row_id: int  # number of the prompt
    text: str  # up to the end-of-sequence token or stop string
    tokens: int  # up to and including the token that ends the response
    nfe: int  # forwards of the model with this row
    tokens_per_forward: float
    ended: bool  # by a token that ends a response, or a stop string
    details: dict = field(default_factory=dict)  # of the options of a choice

    def fields(self) -> dict[str, Any]:
        """Fields of the response in result files."""
        return {"response": self.text, "nfe": self.nfe, "tokens_per_forward": self.tokens_per_forward}


def generate(
    model: DiffLLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    row_ids: Sequence[int] | None = None,
) -> Iterator[Response]:
    """Sample a response to every prompt, `config.batch_size` at once. Yield each as soon as it is done.

    Args:
        prompts: token ids.
        row_ids: numbers of the prompts, which key their draws and name their responses; by default 0 … N-1.

    Raises:
        ValueError: see `check_context` and `special_tokens`.
    """
    check_context(model, max(map(len, prompts), default=0), config)
    special = special_tokens(model, tokenizer, config)
    canvases = (
        Canvas.after(prompt, config.max_new_tokens, special.mask, row_id)
        for prompt, row_id in zip(prompts, range(len(prompts)) if row_ids is None else row_ids, strict=True)
    )
    return (response_of(filled, tokenizer, config) for filled in fill(model, canvases, config, special))


def check_context(model: DiffLLM, prompt_length: int, config: SamplingConfig, what: str = "a prompt") -> None:
    """Refuse a prompt or settings that the model cannot take.

    Args:
        what: names the prompt in the error.

    Raises:
        ValueError: prompt and `max_new_tokens` exceed the model's context, or see `DiffLLM.check_sampling`.
    """
    model.check_sampling(config)
    context = model.lm.config.max_position_embeddings
    if prompt_length + config.max_new_tokens > context:
        raise ValueError(
            f"{what} of {prompt_length} tokens and sampling.max_new_tokens={config.max_new_tokens} do not fit the "
            f"model's context of {context} tokens; lower sampling.max_new_tokens"
        )


def response_of(filled: SampledRow, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig) -> Response:
    """Decode a response up to its end: with all its white space, without masks that the model drew."""
    text = tokenizer.decode([token for token in filled.response if token != tokenizer.mask_token_id])
    end = min((place for stop in config.stop if (place := text.find(stop)) >= 0), default=len(text))
    ended = end < len(text) or filled.new_tokens > len(filled.response)
    return Response(filled.canvas.row_id, text[:end], filled.new_tokens, filled.nfe, filled.tokens_per_forward, ended)


def special_tokens(model: DiffLLM, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig) -> Tokens:
    """Special tokens of the model, its tokenizer, `sampling.stop` and `sampling.forbidden`.

    Raises:
        ValueError: a stop string without tokens, or a forbidden text that is not one token.
    """

    def tokens_of(text: str, name: str) -> tuple[int, ...]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids or (tokenizer.unk_token_id in ids and text != tokenizer.unk_token):
            texts = getattr(config, name)
            raise ValueError(f"sampling.{name}={texts}: {text!r} cannot be written in the model's tokens")
        return tuple(ids)

    # Tokens that do not decode to their stop string could match another text: `is_complete` finds such a string.
    stop = [ids for text in config.stop if tokenizer.decode(ids := tokens_of(text, "stop")) == text]
    forbidden = []
    for text in config.forbidden:
        ids = tokens_of(text, "forbidden")
        if len(ids) > 1:
            raise ValueError(
                f"sampling.forbidden={config.forbidden}: {text!r} is not one token of the model but {len(ids)}: "
                f"{tokenizer.convert_ids_to_tokens(ids)}"
            )
        forbidden += ids
    # Published models also end with the token that ended a turn, or padded an answer, in their training.
    ends = [*model.ends, tokenizer.eos_token_id, turn_end(tokenizer), model.pad_token_id, tokenizer.pad_token_id]
    unnamed = ids_without_token(tokenizer, model.vocab_size)
    eos = dict.fromkeys(token for token in ends if token is not None and token not in unnamed)
    is_complete = stops_in(tokenizer, config.stop) if config.stop else None
    return Tokens(model.mask_token_id, tuple(eos), tuple(stop), (*forbidden, *unnamed), is_complete)


def stops_in(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> Callable[[np.ndarray], bool]:
    """Return a function that finds stop strings in decoded responses, where they may share tokens with other text."""
    # A character has up to 4 tokens. One more keeps a leading blank, which some tokenizers drop.
    window = 4 * max(map(len, stop)) + 1

    def is_complete(response: np.ndarray) -> bool:
        text = tokenizer.decode(response[-window:].tolist())
        return any(string in text for string in stop)

    return is_complete
