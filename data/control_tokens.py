"""Tokenize control tokens in texts as text."""

import re
from collections.abc import Iterator
from functools import cached_property

from transformers import AddedToken, PreTrainedTokenizerBase

from data.chat import END_THINK, THINK, Chat, final_answer
from data.template import change_texts, texts_of, turn_end

PRIVATE_USE = range(0xF0000, 0x10FFFE)  # characters without a meaning


class ControlTokens:
    """Tokenizes control tokens in a chat's texts as text, so that only the chat template writes real ones.

    Control tokens are the special tokens of the tokenizer except `<think>` and `</think>`. Transformers'
    `sanitize_control_tokens` cannot replace this class: it also treats the template's own thinking tags as control
    tokens, drops characters, and does not return where answers begin.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens = {*tokenizer.all_special_tokens, *added} - {""}
        self.special = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
        self._special = _any_of({token: _with_spaces(token, added.get(token)) for token in tokens})
        control = tokens - {THINK, END_THINK}
        self._control = _any_of({token: re.escape(token) for token in control})
        # The tokenizer looks for these in normalized text: lowercased, `<|IM_END|>` is the real `<|im_end|>`.
        self._normalized = {
            self.special[token]: token
            for token in control - {tokenizer.unk_token}
            if tokenizer.is_fast
            and tokenizer.backend_tokenizer.normalizer
            and token in added
            and added[token].normalized
        }

    def hide(self, chat: Chat, place: str) -> tuple[Chat, dict[int, str] | None]:
        """Replace the control tokens in a chat's texts by unused characters.

        From the end of each answer, drops one end-of-sequence or end-of-turn token.

        Returns:
            The chat with placeholders, and the table for `str.translate` that restores the tokens; None if no text
            holds a control token.

        Raises:
            ValueError: an answer holds only such a token.
        """
        if not any(map(self._control.search, texts_of(chat))):
            return chat, {} if self._normalized and self._has_other_spellings(texts_of(chat)) else None
        messages = [
            message | {"content": self._without_end(message["content"], f"{place}: message {number} of the prompt")}
            if message["role"] == "assistant"
            else message
            for number, message in enumerate(chat["prompt"], start=1)
        ]
        chat = chat | {"prompt": messages, "response": self._without_end(chat["response"], f"{place}: the response")}
        taken = {self.tokenizer.get_chat_template(tools=chat.get("tools") or None), *texts_of(chat)}
        unused = (chr(code) for code in PRIVATE_USE if not any(chr(code) in text for text in taken))
        characters: dict[str, str] = {}

        def character(token: re.Match) -> str:
            if token[0] not in characters:
                characters[token[0]] = next(unused)
            return characters[token[0]]

        chat = change_texts(chat, lambda text: self._control.sub(character, text))
        return chat, {ord(character): token for token, character in characters.items()}

    def check_answered(self, response: str, place: str) -> None:
        """Raise ValueError if only an end-of-sequence or end-of-turn token follows the thinking."""
        end = self._end_of(response)
        if end and not final_answer(response.rstrip().removesuffix(end)):
            raise ValueError(f"{place}: the response has no answer after {END_THINK}, only {end}")

    def ids(self, text: str, hidden: dict[int, str], place: str) -> tuple[list[int], list[int]]:
        """Token ids of a text with placeholders, and the start of each token in the text with restored control tokens.

        Raises:
            ValueError: the tokenizer reads a control token as a special token despite `split_special_tokens`.
        """
        ids, starts, at = [], [], 0
        for number, piece in enumerate(self._special.split(text)):
            if number % 2:
                ids.append(self.special[piece] if piece in self.special else self.special[piece.strip()])
                starts.append(at)
            elif piece := piece.translate(hidden):
                made, begins = self._as_text(piece, self._before if number else "")
                real = [token for token in hidden.values() if self.special[token] in made and token in piece]
                if real := [*real, *(token for id, token in self._normalized.items() if id in made)]:
                    raise ValueError(f"{place}: the tokenizer cannot read {real[0]!r} as text: leave it out")
                ids += made
                starts += [at + begin for begin in begins]
            at += len(piece)
        return ids, starts

    def _as_text(self, text: str, before: str) -> tuple[list[int], list[int]]:
        """Token ids of a text after the prefix `before`, and the start of each in the text."""
        made = self.tokenizer(
            before + text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        starts = [start - len(before) for start, _ in made["offset_mapping"]]
        first = next((i for i, (_, end) in enumerate(made["offset_mapping"]) if end > len(before)), len(starts))
        return made["input_ids"][first:], starts[first:]

    @cached_property
    def _before(self) -> str:
        """Prefix for a piece if the tokenizer adds a space at the start of a text but not after a special token."""
        whole, alone = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"{self.tokenizer.eos_token}a", "a")
        )
        return "" if whole[1:] == alone else "\n"

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        end = turn_end(self.tokenizer)
        ends = [self.tokenizer.eos_token, None if end is None else self.tokenizer.convert_ids_to_tokens(end)]
        return tuple(filter(None, ends))

    def _has_other_spellings(self, texts: Iterator[str]) -> bool:
        """Whether the tokenizer's normalizer turns parts of the texts into control tokens."""
        found = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return any(not self._normalized.keys().isdisjoint(ids) for ids in found)

    def _end_of(self, answer: str) -> str | None:
        """The end-of-sequence or end-of-turn token at the end of an answer."""
        text = answer.rstrip()
        return next((end for end in self._ends if text.endswith(end)), None)

    def _without_end(self, answer: str, what: str) -> str:
        text, end = answer.rstrip(), self._end_of(answer)
        if end is None:
            return answer
        if not text.removesuffix(end).strip():
            raise ValueError(f"{what} holds only {end}")
        return text.removesuffix(end)


def _with_spaces(token: str, added: AddedToken | None) -> str:
    """Pattern of a token with the adjacent spaces that the tokenizer includes in it."""
    left, right = (r"\s*" if added and getattr(added, side) else "" for side in ("lstrip", "rstrip"))
    return left + re.escape(token) + right


def _any_of(patterns: dict[str, str]) -> re.Pattern:
    """Compile a pattern that matches any token, longest first; without tokens, one that never matches."""
    longest_first = sorted(patterns, key=lambda token: (-len(token), token))
    return re.compile(f"({'|'.join(patterns[token] for token in longest_first) or '(?!)'})")
