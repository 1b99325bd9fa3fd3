"""Chats into token rows through the tokenizer's chat template."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha1

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data.chat import Chat, Message, to_chat
from data.files import PlacedRow


@dataclass
class TokenRows:
    """Prompts followed by their responses; a response ends with the end-of-sequence token, unless it was cut."""

    input_ids: list[np.ndarray]  # int32, one array a row
    prompt_lengths: np.ndarray  # [rows]
    response_lengths: np.ndarray  # [rows]
    dropped: int = 0  # rows left out because they are too long
    cut: int = 0  # rows whose response lost its end

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[rows] tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    def fingerprint(self) -> str:
        """Tells these rows, in this order, from any others."""
        digest = sha1(self.prompt_lengths.tobytes())
        for ids in self.input_ids:
            digest.update(ids.tobytes() + b"/")
        return digest.hexdigest()


def prompt_ids(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, place: str = "the prompt") -> list[int]:
    """Tokens of a prompt, up to where the assistant begins; `place` names it in errors.

    Raises:
        ValueError: the tokenizer has no chat template, it refuses the messages, or their text has a mask token.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no chat template: set tokenizer.chat_template")
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{place}: the chat template refuses messages of {roles}: {error}") from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id in ids:
        raise ValueError(f"{place}: the text contains the mask token {tokenizer.mask_token!r}")
    return ids


def tokenize(
    rows: Iterable[PlacedRow], tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: str = "error"
) -> TokenRows:
    """Token rows of at most `max_length`.

    Args:
        truncation: of a row that is longer: `error` · `right` cuts its response · `drop`. A prompt that leaves no room
            for a response cannot be cut: it is an error unless dropped.

    Raises:
        ValueError: a row that is not usable, is too long, or no row at all is left.
    """
    kept: list[np.ndarray] = []
    prompt_lengths: list[int] = []
    dropped = cut = 0
    for placed in rows:
        chat: Chat = to_chat(placed)
        prompt = prompt_ids(chat["prompt"], tokenizer, placed.place)
        response = [*tokenizer(chat["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if tokenizer.mask_token_id is not None and tokenizer.mask_token_id in response:
            raise ValueError(f"{placed.place}: the text contains the mask token {tokenizer.mask_token!r}")
        too_long = len(prompt) >= max_length or (len(prompt) + len(response) > max_length and truncation != "right")
        if too_long and truncation == "drop":
            dropped += 1
            continue
        if too_long:
            raise ValueError(
                f"{placed.place}: {len(prompt)} prompt and {len(response)} response tokens do not fit "
                f"data.max_length={max_length}: raise it, or set data.truncation=drop"
                + (" or right" if len(prompt) < max_length else "")
            )
        cut += len(prompt) + len(response) > max_length
        kept.append(np.array((prompt + response)[:max_length], dtype=np.int32))
        prompt_lengths.append(len(prompt))
    if not kept:
        raise ValueError(f"no row is left: all {dropped} are longer than data.max_length={max_length}")
    lengths = np.array([len(ids) for ids in kept])
    return TokenRows(kept, np.array(prompt_lengths), lengths - prompt_lengths, dropped, cut)
