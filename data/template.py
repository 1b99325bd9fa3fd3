"""Render chats by the tokenizer's chat template, and check that it keeps the messages."""

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.chat import END_THINK, THINK, Chat, Message
from data.errors import listed

DAY = datetime(2026, 1, 1)
# Prefix for templates that write the date, so that a row has the same tokens every day. Transformers 5.23 offers no
# other way: it turns a `strftime_now` function in the arguments into text.
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


def check_for_chats(tokenizer: PreTrainedTokenizerBase, loss_on: str = "last") -> None:
    """Refuse a tokenizer that cannot take chats.

    Raises:
        ValueError: the tokenizer has no chat template; or, for `loss_on="all"`, it adds a space before each text, so
            that the tokens of a chat's parts would differ from those of the whole chat.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no chat template: name one by model.chat_template")
    if loss_on == "last":
        return
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids + ids) != "aa":
        raise ValueError(
            "data.loss_on=all: this tokenizer adds a space before each text, so answers in the middle of a chat would "
            "have other tokens than in sampling; set data.loss_on=last"
        )


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the special token that the chat template writes after an answer; None if it writes none.

    A model trained on whole chats ends its answers with this token: LLaDA with `<|eot_id|>`, Dream with `<|im_end|>`.
    """
    if tokenizer.chat_template is None:
        return None
    chat = [Message(role="user", content="Do you?"), Message(role="assistant", content="I do.")]
    try:
        _, found, after = _render(chat, tokenizer, "a chat", generation=False).rpartition("I do.")
    except ValueError:  # the template refuses answers
        return None
    ids = tokenizer(after.strip(), add_special_tokens=False)["input_ids"] if found else []
    special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    return ids[0] if ids and ids[0] in special else None


def render_parts(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, loss_on: str, place: str, mark: str, hidden: dict[int, str] | None
) -> list[str]:
    """Render a chat up to its last answer, cut into context, trained answer, context, …, context.

    Args:
        mark: the token that the template writes after an answer, or an empty text.
        hidden: the table of `ControlTokens.hide`.

    Raises:
        ValueError: the template rewrites an earlier answer when messages follow, or its thinking tags contradict those
            of an answer.
    """
    prompt, tools = chat["prompt"], chat.get("tools")
    whole = render_prompt(chat, tokenizer, place, hidden)
    _check_thinking_tags(prompt, whole, chat["response"], tokenizer, place, tools)
    if loss_on == "last":
        return [whole]
    parts, done = [], 0
    for i, message in enumerate(prompt):
        if message["role"] != "assistant" or not message.get("trained", True):
            continue
        before, content = _render(prompt[:i], tokenizer, place, tools), message["content"]
        _check_thinking_tags(prompt[:i], before, content, tokenizer, place, tools)
        turn = _render(prompt[: i + 1], tokenizer, place, tools, generation=False)[len(before) :]
        opening, found, after = turn.partition(content.strip())
        # Some templates begin the next answer even with add_generation_prompt=False.
        if mark and mark in after:
            turn = opening + found + after.partition(mark)[0] + mark
        answer = turn.rstrip()
        if not (found and whole.startswith(before + answer)):
            raise ValueError(
                f"{place}: the chat template rewrites message {i + 1} when others follow, so it cannot be trained on; "
                "set data.loss_on=last"
            )
        parts += [whole[done : len(before)], answer]
        done = len(before + answer)
    return [*parts, whole[done:]]


def _check_thinking_tags(
    messages: Sequence[Message],
    rendered: str,
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
    place: str,
    tools: list[dict[str, Any]] | None,
) -> None:
    """Refuse an answer that contradicts the thinking tags which the template writes at the end of the prompt."""
    *before, last = messages
    if TAG.search(last["content"]):  # replace the message's own tags
        rendered = _render([*before, last | {"content": TAG.sub("tag", last["content"])}], tokenizer, place, tools)
    begins = answer.lstrip().startswith(THINK)
    if rendered.rstrip().endswith(THINK):
        if begins or END_THINK not in answer:
            own = "its own" if begins else f"no {END_THINK}"
            raise ValueError(
                f"{place}: the chat template writes {THINK} before the answer, which has {own}; set {ADVICE}"
            )
    elif EMPTY_THINKING.search(rendered) and (begins or END_THINK in answer):
        raise ValueError(
            f"{place}: the chat template writes {THINK}{END_THINK} before the answer, which has thinking of its own; "
            f"leave out {ADVICE}"
        )


def render_prompt(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, place: str, hidden: dict[int, str] | None = None
) -> str:
    """Render a prompt up to the start of the response.

    Args:
        hidden: the table of `ControlTokens.hide`.

    Raises:
        ValueError: the template refuses the messages, leaves out a message or the tools, or escapes control tokens in
            the tools.
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
    r"""Refuse control tokens in tools if the template escapes their placeholders, as in `\U000f0000`."""
    held = [token for code, token in hidden.items() if any(chr(code) in text for text in _texts_in(chat["tools"]))]
    real = _map_texts(chat["tools"], lambda text: text.translate(hidden))
    if held and rendered.translate(hidden) != _render(chat["prompt"], tokenizer, place, real).translate(hidden):
        raise ValueError(
            f"{place}: the chat template escapes {listed(held)} of field 'tools': take it out of the tools, or choose "
            "another by model.chat_template"
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
    except Exception as error:  # a template is a program and can raise anything
        raise ValueError(f"{place}: the chat template refuses messages of {roles}: {error}") from error
    for number, message in enumerate(messages, start=1):
        if message["role"] != "assistant" and message["content"].strip() not in text:
            raise ValueError(
                f"{place}: the chat template leaves out or rewrites message {number} of {roles}; choose another by "
                "model.chat_template"
            )
    return text


def texts_of(chat: Chat) -> Iterator[str]:
    """Yield the contents, the response, and the texts of the tools of a chat."""
    yield from (message["content"] for message in chat["prompt"])
    yield chat["response"]
    yield from _texts_in(chat.get("tools"))


def _texts_in(value: Any) -> list[str]:
    """All texts in a nested value, keys included."""
    found: list[str] = []
    _map_texts(value, lambda text: found.append(text) or text)
    return found


def change_texts(chat: Chat, change: Callable[[str], str]) -> Chat:
    """Apply `change` to the contents, the response, and the keys and values of the tools."""
    messages = [message | {"content": change(message["content"])} for message in chat["prompt"]]
    changed = chat | {"prompt": messages, "response": change(chat["response"])}
    return changed | {"tools": _map_texts(chat["tools"], change)} if "tools" in chat else changed


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to all texts of a nested value, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_texts(key, change): _map_texts(item, change) for key, item in value.items()}
    return [_map_texts(item, change) for item in value] if isinstance(value, list) else value
