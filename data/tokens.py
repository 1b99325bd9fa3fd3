"""Chats into token rows through the tokenizer's chat template."""

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from hashlib import sha1
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import AddedToken, PreTrainedTokenizerBase

from data.chat import END_THINK, THINK, Chat, Message, final_answer
from data.errors import listed

DAY = datetime(2026, 1, 1)
# In front of templates that write the date: so a row is the same on every day.
ONE_DAY = "".join(
    [
        "{% macro strftime_now(format) %}{{ format",
        *(f" | replace('%{code}', '{DAY.strftime(f'%{code}')}')" for code in (*"aAbBdHIjmMpSyY", "-d")),
        " }}{% endmacro %}",
    ]
)
TAG = re.compile(f"{THINK}|{END_THINK}")
EMPTY_THINKING = re.compile(rf"{THINK}\s*{END_THINK}\s*\Z")
ADVICE = "model.chat_template_kwargs={enable_thinking: false}, or choose another by model.chat_template"
PRIVATE_USE = range(0xF0000, 0x10FFFE)  # characters without a meaning
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "prompt_length": pa.int32(),
        "context": pa.list_(pa.int32()),
        "thinking_tokens": pa.int32(),
        "answer_tokens": pa.int32(),
        "cut": pa.int32(),
        "source": pa.int32(),
        "difficulty": pa.float64(),
        "place": pa.string(),
    }
)


class Encoded(NamedTuple):
    """A chat in tokens."""

    input_ids: list[int]  # prompt, then response with the end-of-sequence token
    prompt_length: int
    context: list[int]  # start, end, start, end, … of what in the response is not trained on: later questions
    thinking_tokens: int  # of the last answer, without its tags; 0 where there are none
    answer_tokens: int  # of the last answer, after its thinking, without the end-of-sequence token
    thinking_end: int  # where the thinking ends
    control: bool = False  # whether its texts hold control tokens, which are text

    def until(self, length: int) -> "Encoded":
        """What its first `length` tokens hold."""
        thinking_lost, answer_lost = (max(0, end - length) for end in (self.thinking_end, len(self.input_ids) - 1))
        return self._replace(
            input_ids=self.input_ids[:length],
            thinking_tokens=max(0, self.thinking_tokens - thinking_lost),
            answer_tokens=max(0, self.answer_tokens - answer_lost),
        )


class TokenRows:
    """Prompts followed by their responses; a response ends with the end-of-sequence token, unless it was cut.

    Args:
        table: of SCHEMA, in memory or mapped from a file: of its tokens only what is asked for is read.
        chosen: rows of the table, in order; all by default.
    """

    def __init__(self, table: pa.Table, chosen: np.ndarray | None = None):
        self.table = table
        self.chosen = range(len(table)) if chosen is None else chosen  # an array of all would grow with them
        self._starts = np.cumsum([0, *map(len, table["input_ids"].chunks)])
        self._chunks = {name: [_numpy(chunk) for chunk in table[name].chunks] for name in ("input_ids", "context")}

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], prompt_lengths: Sequence[int], cut: bool = False) -> "TokenRows":
        """Rows given as token arrays, whole or all cut."""
        encoded = [
            {"input_ids": ids, "prompt_length": length, "cut": int(cut)}
            for ids, length in zip(rows, prompt_lengths, strict=True)
        ]
        return cls(pa.Table.from_pylist(encoded, SCHEMA))

    def __len__(self) -> int:
        return len(self.chosen)

    def select(self, rows: np.ndarray) -> "TokenRows":
        """Some of the rows, in the order given."""
        return TokenRows(self.table, self._of_chosen(np.arange(len(self.table)))[rows])

    def ids(self, row: int) -> np.ndarray:
        """[prompt + response] int32 tokens of a row."""
        return self._list("input_ids", row)

    def context(self, row: int) -> np.ndarray:
        """[spans, 2] where each part of a row begins and ends that is in its response and not trained on."""
        return self._list("context", row).reshape(-1, 2)

    def place(self, row: int) -> str:
        """Where a row came from, as `file:line`."""
        return self.table["place"][int(self.chosen[row])].as_py()

    def column(self, name: str) -> np.ndarray:
        """[rows] of a column of numbers."""
        return self._of_chosen(self.table[name].to_numpy())

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """[rows] tokens up to where the first answer begins."""
        return self.column("prompt_length").astype(np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[rows] tokens of prompt and response."""
        return self._list_lengths("input_ids")

    @cached_property
    def cut(self) -> np.ndarray:
        """[rows] whether the response lost its end when it was tokenized."""
        return self.column("cut").astype(bool)

    @cached_property
    def response_lengths(self) -> np.ndarray:
        """[rows] tokens after the prompt."""
        return self.lengths - self.prompt_lengths

    def fingerprint(self) -> str:
        """Tells these rows, in this order, from any others, and what they are mixed and ordered by."""
        digest = sha1(self.prompt_lengths)
        for name in ("source", "difficulty"):
            if self.table[name].null_count < len(self.table) and self.column(name).any():
                digest.update(self.column(name))
        for name in ("input_ids", "context"):
            digest.update(self._list_lengths(name))
            for part in self._lists(name):
                digest.update(part)
        return digest.hexdigest()

    def _of_chosen(self, values: np.ndarray) -> np.ndarray:
        return values if isinstance(self.chosen, range) else values[self.chosen]

    def _list_lengths(self, name: str) -> np.ndarray:
        return self._of_chosen(np.concatenate([np.diff(offsets) for offsets, _ in self._chunks[name]]).astype(np.int64))

    def _lists(self, name: str) -> Iterator[np.ndarray]:
        """All of a column, row after row: in chunks where no rows are chosen, which is fast."""
        if isinstance(self.chosen, range):
            yield from (values[offsets[0] : offsets[-1]] for offsets, values in self._chunks[name])
        else:
            yield from (self._list(name, row) for row in range(len(self)))

    def _list(self, name: str, row: int) -> np.ndarray:
        place = self.chosen[row]
        chunk = np.searchsorted(self._starts, place, side="right") - 1
        offsets, values = self._chunks[name][chunk]
        within = place - self._starts[chunk]
        return values[offsets[within] : offsets[within + 1]]


def _numpy(chunk: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a chunk, without a copy."""
    return chunk.offsets.to_numpy(), chunk.values.to_numpy()


def check_for_chats(tokenizer: PreTrainedTokenizerBase, loss_on: str = "last") -> None:
    """Refuse a tokenizer that cannot take chats.

    Raises:
        ValueError: it has no chat template, or it puts a space before each text: parts of a chat would not be what they
            are in the whole.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no chat template: name one by model.chat_template")
    if loss_on == "last":
        return
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids + ids) != "aa":
        raise ValueError(
            "data.loss_on=all: this tokenizer begins each text with a space, so that an answer in the middle of a chat "
            "would be in other tokens than in sampling; set data.loss_on=last"
        )


class ControlTokens:
    """Reads the control tokens that texts hold as text, so that only the chat template writes real ones.

    Control tokens are the special tokens of the tokenizer, but for `<think>` and `</think>`. Transformers'
    `sanitize_control_tokens` does not serve here: it takes the tags for control tokens where the template writes them,
    drops characters, and does not tell where answers begin.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens = {*tokenizer.all_special_tokens, *added} - {""}
        self.special = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
        self._special = _any_of({token: _with_spaces(token, added.get(token)) for token in tokens})
        control = tokens - {THINK, END_THINK}
        self._control = _any_of({token: re.escape(token) for token in control})
        # The tokenizer finds these in normalized text: lowercased, `<|IM_END|>` is the real `<|im_end|>`.
        self._normalized = {
            self.special[token]: token
            for token in control - {tokenizer.unk_token}
            if tokenizer.is_fast
            and tokenizer.backend_tokenizer.normalizer
            and token in added
            and added[token].normalized
        }

    def hide(self, chat: Chat, place: str) -> tuple[Chat, dict[int, str] | None]:
        """Put unused characters for the control tokens in a chat's texts.

        One end-of-sequence token, or end of a turn, is dropped from the end of an answer.

        Returns:
            The chat with placeholders, and the table for `str.translate` that restores the tokens; None if no text
            holds one.

        Raises:
            ValueError: nothing else is in an answer.
        """
        if not any(map(self._control.search, _texts(chat))):
            return chat, {} if self._normalized and self._in_other_letters(_texts(chat)) else None
        messages = [
            message | {"content": self._without_end(message["content"], f"{place}: message {number} of the prompt")}
            if message["role"] == "assistant"
            else message
            for number, message in enumerate(chat["prompt"], start=1)
        ]
        chat = chat | {"prompt": messages, "response": self._without_end(chat["response"], f"{place}: the response")}
        taken = {self.tokenizer.get_chat_template(tools=chat.get("tools") or None), *_texts(chat)}
        unused = (chr(code) for code in PRIVATE_USE if not any(chr(code) in text for text in taken))
        characters: dict[str, str] = {}

        def character(token: re.Match) -> str:
            if token[0] not in characters:
                characters[token[0]] = next(unused)
            return characters[token[0]]

        chat = _change_texts(chat, lambda text: self._control.sub(character, text))
        return chat, {ord(character): token for token, character in characters.items()}

    def check_answered(self, response: str, place: str) -> None:
        """Refuse thinking that is followed by an end of the turn only.

        Raises:
            ValueError: naming the end.
        """
        end = self._end_of(response)
        if end and not final_answer(response.rstrip().removesuffix(end)):
            raise ValueError(f"{place}: the response has no answer behind {END_THINK}, only {end}")

    def ids(self, text: str, hidden: dict[int, str], place: str) -> tuple[list[int], list[int]]:
        """Tokens of a text after `hide`, and where each begins in the text with its control tokens.

        Raises:
            ValueError: the tokenizer reads a control token as one even where it is told not to.
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
                    raise ValueError(f"{place}: the tokenizer cannot read {real[0]!r} as text, leave it out")
                ids += made
                starts += [at + begin for begin in begins]
            at += len(piece)
        return ids, starts

    def _as_text(self, text: str, before: str) -> tuple[list[int], list[int]]:
        """Tokens and where they begin of a text that follows `before`."""
        made = self.tokenizer(
            before + text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        starts = [start - len(before) for start, _ in made["offset_mapping"]]
        first = next((i for i, (_, end) in enumerate(made["offset_mapping"]) if end > len(before)), len(starts))
        return made["input_ids"][first:], starts[first:]

    @cached_property
    def _before(self) -> str:
        """Prefix for a piece, where the tokenizer adds a space at the start of a text but not after a special token."""
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

    def _in_other_letters(self, texts: Iterator[str]) -> bool:
        """Whether the tokenizer makes control tokens of texts that do not spell them."""
        found = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return any(not self._normalized.keys().isdisjoint(ids) for ids in found)

    def _end_of(self, answer: str) -> str | None:
        """The end-of-sequence token, or end of a turn, that an answer ends with."""
        text = answer.rstrip()
        return next((end for end in self._ends if text.endswith(end)), None)

    def _without_end(self, answer: str, what: str) -> str:
        text, end = answer.rstrip(), self._end_of(answer)
        if end is None:
            return answer
        if not text.removesuffix(end).strip():
            raise ValueError(f"{what} is empty but for {end}")
        return text.removesuffix(end)


def _with_spaces(token: str, added: AddedToken | None) -> str:
    """The pattern of a token, with the spaces beside it that the tokenizer makes part of it."""
    left, right = (r"\s*" if added and getattr(added, side) else "" for side in ("lstrip", "rstrip"))
    return left + re.escape(token) + right


def _any_of(patterns: dict[str, str]) -> re.Pattern:
    """Compile a pattern that matches any token, longest first; without tokens, one that never matches."""
    longest_first = sorted(patterns, key=lambda token: (-len(token), token))
    return re.compile(f"({'|'.join(patterns[token] for token in longest_first) or '(?!)'})")


def _texts(chat: Chat) -> Iterator[str]:
    yield from (message["content"] for message in chat["prompt"])
    yield chat["response"]
    yield from _texts_in(chat.get("tools"))


def _texts_in(value: Any) -> list[str]:
    """All texts in a value, keys included."""
    found: list[str] = []
    _map_texts(value, lambda text: found.append(text) or text)
    return found


def _change_texts(chat: Chat, change: Callable[[str], str]) -> Chat:
    """The chat with its texts changed: contents, the response, and keys and values of tools."""
    messages = [message | {"content": change(message["content"])} for message in chat["prompt"]]
    changed = chat | {"prompt": messages, "response": change(chat["response"])}
    return changed | {"tools": _map_texts(chat["tools"], change)} if "tools" in chat else changed


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with all texts in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_texts(key, change): _map_texts(item, change) for key, item in value.items()}
    return [_map_texts(item, change) for item in value] if isinstance(value, list) else value


def prompt_ids(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    place: str = "the prompt",
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Tokens of a prompt, up to where the assistant begins; control tokens in its texts are text.

    Args:
        place: names the prompt in errors.
        tools: for the chat template.

    Raises:
        ValueError: the tokenizer has no chat template, or it refuses the messages or leaves out some of their text or
            the tools.
    """
    check_for_chats(tokenizer)
    control = ControlTokens(tokenizer)
    chat, hidden = control.hide(Chat(prompt=list(messages), response="", tools=tools or []), place)
    text = _render_prompt(chat, tokenizer, place, hidden)
    if hidden is None:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return control.ids(text, hidden, place)[0]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes behind an answer, None where it writes none.

    A model that was trained on whole chats ends its answers with it: LLaDA with `<|eot_id|>`, Dream with `<|im_end|>`.
    """
    if tokenizer.chat_template is None:
        return None
    chat = [Message(role="user", content="Do you?"), Message(role="assistant", content="I do.")]
    try:
        _, found, behind = _render(chat, tokenizer, "a chat", generation=False).rpartition("I do.")
    except ValueError:  # it takes no answers
        return None
    ids = tokenizer(behind.strip(), add_special_tokens=False)["input_ids"] if found else []
    special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    return ids[0] if ids and ids[0] in special else None


def encode(
    chats: Sequence[Chat], places: Sequence[str], tokenizer: PreTrainedTokenizerBase, loss_on: str = "last"
) -> list[Encoded | ValueError]:
    """Chats in tokens, or what is wrong with them.

    Args:
        places: name the chats in errors.
        loss_on: `last`, the last answer · `all`, every answer that is trained on, the earlier ones as the template
            writes them, with the mark that ends a turn.
    """
    end = turn_end(tokenizer) if loss_on == "all" else None
    mark = "" if end is None else tokenizer.convert_ids_to_tokens(end)
    control, eos = ControlTokens(tokenizer), tokenizer.eos_token_id
    rows: dict[int, Encoded | ValueError] = {}
    plain: dict[int, tuple[list[str], str]] = {}  # without control tokens, to be tokenized together
    for i, (chat, place) in enumerate(zip(chats, places, strict=True)):
        try:
            chat, hidden = control.hide(chat, place)
            parts, response = _parts(chat, tokenizer, loss_on, place, mark, hidden), chat["response"]
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


def _parts(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, loss_on: str, place: str, mark: str, hidden: dict[int, str] | None
) -> list[str]:
    """The text before the last answer, cut where what is trained on begins or ends: context, answer, …, context.

    Args:
        mark: what the template ends an answer with.
        hidden: the table of `ControlTokens.hide`.

    Raises:
        ValueError: the template writes earlier answers in another way than it wrote them when they came, or begins or
            ends thinking where an answer does not.
    """
    prompt, tools = chat["prompt"], chat.get("tools")
    whole = _render_prompt(chat, tokenizer, place, hidden)
    _check_continues(_begun(prompt, whole, tokenizer, place, tools), chat["response"], place)
    if loss_on == "last":
        return [whole]
    parts, done = [], 0
    for i, message in enumerate(prompt):
        if message["role"] != "assistant" or not message.get("trained", True):
            continue
        before, content = _render(prompt[:i], tokenizer, place, tools), message["content"]
        _check_continues(_begun(prompt[:i], before, tokenizer, place, tools), content, place)
        turn = _render(prompt[: i + 1], tokenizer, place, tools, generation=False)[len(before) :]
        said, found, behind = turn.partition(content.strip())
        # some templates begin the next answer whether or not that is asked for
        if mark and mark in behind:
            turn = said + found + behind.partition(mark)[0] + mark
        answer = turn.rstrip()
        if not (found and whole.startswith(before + answer)):
            raise ValueError(
                f"{place}: the chat template rewrites message {i + 1} when others follow, so it cannot be trained on "
                "there: set data.loss_on=last"
            )
        parts += [whole[done : len(before)], answer]
        done = len(before + answer)
    return [*parts, whole[done:]]


def _begun(
    messages: Sequence[Message],
    rendered: str,
    tokenizer: PreTrainedTokenizerBase,
    place: str,
    tools: list[dict[str, Any]] | None,
) -> str:
    """A rendered prompt in which tags of thinking at the end are the template's: none is left in the last message."""
    *before, last = messages
    if not TAG.search(last["content"]):
        return rendered
    return _render([*before, last | {"content": TAG.sub("tag", last["content"])}], tokenizer, place, tools)


def _check_continues(before: str, answer: str, place: str) -> None:
    """Refuse an answer that does not go on with the thinking as a rendered prompt leaves it."""
    begins = answer.lstrip().startswith(THINK)
    if before.rstrip().endswith(THINK):
        if begins or END_THINK not in answer:
            own = "its own" if begins else f"no {END_THINK}"
            raise ValueError(
                f"{place}: the chat template writes {THINK} before the answer, which has {own}; set {ADVICE}"
            )
    elif EMPTY_THINKING.search(before) and (begins or END_THINK in answer):
        raise ValueError(
            f"{place}: the chat template writes {THINK}{END_THINK} before the answer, which has thinking of its own; "
            f"leave out {ADVICE}"
        )


def _join(pieces: list[list[int]], thinking_tokens: int, answer_tokens: int, thinking_end: int) -> Encoded:
    """Context and answers by turns, context first, into one row; `thinking_end` counts from the last answer."""
    bounds = np.cumsum([0, *map(len, pieces)]).tolist()
    context = [bound for start in range(2, len(pieces), 2) for bound in bounds[start : start + 2]]
    ids = [token for piece in pieces for token in piece]
    return Encoded(ids, bounds[1], context, thinking_tokens, answer_tokens, bounds[-2] + thinking_end)


def _count(response: str, starts: Sequence[int]) -> tuple[int, int, int]:
    """Tokens of the thinking, of the answer behind it, and up to where the thinking ends.

    Args:
        starts: where each token begins.
    """
    thinking, end, _ = response.rpartition(END_THINK)
    if not end:
        return 0, len(starts), 0
    begin = thinking.find(THINK) + len(THINK) if THINK in thinking else 0
    bounds = [begin, len(thinking), len(thinking + end)]
    first, last, answer = np.searchsorted(starts, bounds).tolist()
    return last - first, len(starts) - answer, last


def _render_prompt(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, place: str, hidden: dict[int, str] | None = None
) -> str:
    """Render a prompt up to where the response begins.

    Args:
        hidden: the table of `ControlTokens.hide`.

    Raises:
        ValueError: the template refuses the messages, leaves out some or the tools, or escapes placeholders in tools.
    """
    text = _render(chat["prompt"], tokenizer, place, tools := chat.get("tools"))
    if tools and text == _render(chat["prompt"], tokenizer, place):
        raise ValueError(
            f"{place}: the chat template leaves out the tools of field 'tools'; choose another by model.chat_template, "
            "or leave the column out"
        )
    if tools and hidden:
        _check_tools(text, chat, hidden, tokenizer, place)
    return text


def _check_tools(
    rendered: str, chat: Chat, hidden: dict[int, str], tokenizer: PreTrainedTokenizerBase, place: str
) -> None:
    r"""Refuse control tokens in tools that a template escapes: `\U000f0000` would not become its token again."""
    held = [token for code, token in hidden.items() if any(chr(code) in text for text in _texts_in(chat["tools"]))]
    real = _map_texts(chat["tools"], lambda text: text.translate(hidden))
    if held and rendered.translate(hidden) != _render(chat["prompt"], tokenizer, place, real).translate(hidden):
        raise ValueError(
            f"{place}: the chat template does not write {listed(held)} of field 'tools' as it stands: take it out of "
            "the tools, or choose another by model.chat_template"
        )


def _render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    place: str,
    tools: list[dict[str, Any]] | None = None,
    generation: bool = True,
) -> str:
    roles = ", ".join(message["role"] for message in messages)
    template = tokenizer.get_chat_template(tools=tools or None)
    if "strftime_now" in template:
        template = ONE_DAY + template
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=tools or None,
            chat_template=template,
            add_generation_prompt=generation,
            tokenize=False,
        )
    except Exception as error:  # a template is a program: it ends in whatever fails first
        raise ValueError(f"{place}: the chat template refuses messages of {roles}: {error}") from error
    for number, message in enumerate(messages, start=1):
        if message["role"] != "assistant" and message["content"].strip() not in text:
            raise ValueError(
                f"{place}: of messages of {roles} the chat template leaves out or rewrites number {number}; choose "
                "another by model.chat_template"
            )
    return text
