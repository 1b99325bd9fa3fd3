"""Encode chats as tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.chat import END_THINK, THINK, Chat, Message
from data.control_tokens import ControlTokens
from data.template import check_for_chats, render_parts, render_prompt, turn_end


class Encoded(NamedTuple):
    """A chat in tokens."""

    input_ids: list[int]  # prompt, then response with the end-of-sequence token
    prompt_length: int
    context: list[int]  # start, end, start, end, … of the untrained parts of the response
    thinking_tokens: int  # of the last answer, without the tags
    answer_tokens: int  # of the last answer, after its thinking, without the end-of-sequence token
    thinking_end: int  # index of the token after the thinking
    control: bool = False  # whether a text of the chat holds a control token

    def until(self, length: int) -> "Encoded":
        """Cut after `length` tokens."""
        thinking_lost, answer_lost = (max(0, end - length) for end in (self.thinking_end, len(self.input_ids) - 1))
        return self._replace(
            input_ids=self.input_ids[:length],
            thinking_tokens=max(0, self.thinking_tokens - thinking_lost),
            answer_tokens=max(0, self.answer_tokens - answer_lost),
        )


def prompt_ids(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    place: str = "the prompt",
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a prompt, up to the start of the answer; control tokens in its texts are read as text.

    Args:
        place: names the prompt in errors.
        tools: for the chat template.

    Raises:
        ValueError: the tokenizer has no chat template; or the template refuses the messages, or leaves out text or the
            tools.
    """
    check_for_chats(tokenizer)
    control = ControlTokens(tokenizer)
    chat, hidden = control.hide(Chat(prompt=list(messages), response="", tools=tools or []), place)
    text = render_prompt(chat, tokenizer, place, hidden)
    if hidden is None:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return control.ids(text, hidden, place)[0]


def encode(
    chats: Sequence[Chat], places: Sequence[str], tokenizer: PreTrainedTokenizerBase, loss_on: str = "last"
) -> list[Encoded | ValueError]:
    """Encode chats; return the error in place of a chat that cannot be encoded.

    Args:
        places: name the chats in errors.
        loss_on: `last` trains on the last answer · `all` also on earlier ones, as the template writes them, with the
            token that ends a turn.
    """
    end = turn_end(tokenizer) if loss_on == "all" else None
    mark = "" if end is None else tokenizer.convert_ids_to_tokens(end)
    control, eos = ControlTokens(tokenizer), tokenizer.eos_token_id
    rows: dict[int, Encoded | ValueError] = {}
    plain: dict[int, tuple[list[str], str]] = {}  # chats without control tokens, tokenized in one call
    for i, (chat, place) in enumerate(zip(chats, places, strict=True)):
        try:
            chat, hidden = control.hide(chat, place)
            parts, response = render_parts(chat, tokenizer, loss_on, place, mark, hidden), chat["response"]
            if hidden is None:
                plain[i] = parts, response
                continue
            before = [control.ids(part, hidden, place)[0] for part in parts]
            ids, starts = control.ids(response, hidden, place)
            rows[i] = _join([*before, [*ids, eos]], *_count(response.translate(hidden), starts))._replace(control=True)
        except ValueError as error:
            rows[i] = error
    if plain:
        texts = [text for parts, _ in plain.values() for text in parts]
        contexts = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        responses = [response for _, response in plain.values()]
        answers = tokenizer(responses, add_special_tokens=False, return_offsets_mapping=True)
        for (i, (parts, response)), ids, offsets in zip(
            plain.items(), answers["input_ids"], answers["offset_mapping"], strict=True
        ):
            before = [next(contexts) for _ in parts]
            rows[i] = _join([*before, [*ids, eos]], *_count(response, [start for start, _ in offsets]))
    return [rows[i] for i in range(len(chats))]


def _join(pieces: list[list[int]], thinking_tokens: int, answer_tokens: int, thinking_end: int) -> Encoded:
    """Join context, answer, context, … into one row; `thinking_end` counts from the start of the last answer."""
    bounds = np.cumsum([0, *map(len, pieces)]).tolist()
    context = [bound for start in range(2, len(pieces), 2) for bound in bounds[start : start + 2]]
    ids = [token for piece in pieces for token in piece]
    return Encoded(ids, bounds[1], context, thinking_tokens, answer_tokens, bounds[-2] + thinking_end)


def _count(response: str, starts: Sequence[int]) -> tuple[int, int, int]:
    """Number of tokens in the thinking, in the answer after it, and up to the end of the thinking.

    Args:
        starts: the start of each token in the response.
    """
    thinking, end, _ = response.rpartition(END_THINK)
    if not end:
        return 0, len(starts), 0
    begin = thinking.find(THINK) + len(THINK) if THINK in thinking else 0
    bounds = [begin, len(thinking), len(thinking + end)]
    first, last, answer = np.searchsorted(starts, bounds).tolist()
    return last - first, len(starts) - answer, last
