"""Text of a response while it forms: what can no longer change, and the whole draft."""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from sampling import SamplingConfig, StepEvent, trim

BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of some tokenizers that stands for a byte
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # decoded from a character whose last bytes are missing


class FinalText:
    """Follows a response, and returns its text as soon as it is final.

    Final is the text before the first mask, but not an incomplete character at its end, nor one that may begin a stop
    string. With `remask`, and for tokenizers that change the text before a token, nothing is final before the end.

    Args:
        eos: ids that end a response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig, eos: Sequence[int]):
        self.tokenizer, self.config, self.eos = tokenizer, config, eos
        self.sent = ""
        written = tokenizer.decode(tokenizer("a .", add_special_tokens=False)["input_ids"])
        self._streams = not config.remask and written.endswith("a .")

    def after(self, event: StepEvent) -> str:
        """Text that a step has made final."""
        if not self._streams:
            return ""
        masked, tokens = (array[event.prompt_length :] for array in (event.masked, event.tokens))
        ids = trim(tokens[: masked.argmax() if masked.any() else len(tokens)].tolist(), self.eos)
        while ids and BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(ids[-1])):
            ids.pop()
        text = self.tokenizer.decode(ids).rstrip(INCOMPLETE)
        return self._send(without_stop(text, self.config.stop))

    def rest(self, text: str) -> str:
        """Return the part of the whole text that was not sent yet."""
        return self._send(text)

    def _send(self, text: str) -> str:
        new = text[len(self.sent) :]
        self.sent += new
        return new


def without_stop(text: str, stop: Sequence[str]) -> str:
    """A text before the first stop string, or before an end that may begin one."""
    found = [place for string in stop if (place := text.find(string)) >= 0]
    if found:
        return text[: min(found)]
    begun = (n for string in stop for n in range(1, min(len(string), len(text) + 1)) if text.endswith(string[:n]))
    return text[: len(text) - max(begun, default=0)]


def draft(event: StepEvent, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The response after a step: pieces of text, without special tokens, and numbers of masked positions."""
    response = zip(event.masked.tolist(), event.tokens.tolist(), strict=True)
    pieces: list[dict[str, Any]] = []
    for masked, run in groupby([*response][event.prompt_length :], key=lambda token: token[0]):
        ids = [token for _, token in run]
        pieces.append({"masked": len(ids)} if masked else {"text": tokenizer.decode(ids, skip_special_tokens=True)})
    return {"step": event.step, "nfe": event.nfe, "pieces": pieces}
