"""Convert rows to chats: the messages before an answer, and the answer to train on."""

import json
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from data.errors import listed, nearest
from data.readers import PlacedRow

THINK, END_THINK = "<think>", "</think>"
# Prompt field and answer field of each schema. A row has the first schema whose prompt field it holds.
SCHEMAS = {"messages": "messages", "prompt": "response", "question": "answer"}
COMPLETION = "completion"  # alias of `response`
ANSWERS = ("response", COMPLETION, "answer")
SYSTEM = ("system", "system_prompt", "system_message")  # row fields with the system message
REASONING = ("reasoning_content", "reasoning", "thinking")  # fields with the thinking before an answer
TRAINED = ("weight", "loss", "train")  # marks of an assistant's message: 0 means context only
METADATA = ("source", "difficulty", "metadata", "thinking_tokens", "answer_tokens")  # read by curation and verifiers
NAMES = (*SCHEMAS, *ANSWERS, *SYSTEM, "tools", *REASONING)  # allowed keys of data.columns
CONVERTED = {"instruction": "alpaca", "conversations": "sharegpt"}  # field → set of data.prepare that has it
MAX_TEXT = 2**20  # characters of one text, tokenized in one call

# Fields that each schema reads in a row, and in a message.
USED = {
    schema: frozenset([schema, answer, *SYSTEM, "tools", *METADATA, *more])
    for (schema, answer), more in zip(SCHEMAS.items(), [(), (COMPLETION, *REASONING), REASONING], strict=True)
}
IN_MESSAGES = frozenset(["role", "content", *REASONING, *TRAINED])

# Fields of common formats that this project ignores although they matter: a row that holds one is refused.
MEDIA = tuple(f"{kind}{form}" for kind in ("image", "video", "audio") for form in ("", "s", "_url", "_path"))
MASKS = ("assistant_masks", "completion_mask", "loss_mask", "sample_weight")
NOT_TEXT = ("tool_calls", "function_call", "functions", "documents", *MEDIA)
NOT_IN_MESSAGES = (*NOT_TEXT, "tools", "tool_call_id", "reasoning_details")
NO_MARKS = {"train_on_turn": True, "training": True, "masked": False, "prefix": False}  # answer mark: no-op value
IN_PARTS = ("type", "text", "cache_control")  # fields of a content part
NOT_IN_PROMPTS = (*NOT_TEXT, "context", "history", "suffix", "chat_template_kwargs")
PREFERENCES = ("chosen", "rejected", "rejected_response", "label", "labels", "completions")
NOT_IN_ROWS = (*NOT_IN_PROMPTS, *PREFERENCES, *MASKS, *REASONING, "reasoning_details")
# Common column names, for the advice about data.columns.
PROMPT_COLUMNS = ("prompt", "question", "query", "instruction", "input", "problem", "user", "text")
ANSWER_COLUMNS = ("response", "answer", "output", "completion", "solution", "target", "reply", "assistant")


class Message(TypedDict):
    role: str
    content: str
    trained: NotRequired[bool]  # False: the answer is context only


class Chat(TypedDict):
    prompt: list[Message]
    response: str
    tools: NotRequired[list[dict[str, Any]]]  # for the chat template


class Columns:
    """Renames the columns of rows by data.columns.

    Args:
        columns: schema field → column of the files.
    """

    def __init__(self, columns: Mapping[str, str] | None):
        self.columns, self._known = columns or {}, set()

    def __call__(self, placed: PlacedRow) -> PlacedRow:
        """Return the row with schema field names.

        Raises:
            ValueError: the row also holds a field with the new name of a column.
        """
        if not self.columns:
            return placed
        row, place = placed
        self._known.update(row)
        taken = {name: column for name, column in self.columns.items() if column in row}
        others = {name: value for name, value in row.items() if name not in taken.values()}
        for name, column in taken.items():
            if is_given(others.get(name)):
                raise ValueError(f"{place}: data.columns={{{name}: {column}}}, but the row also has a field '{name}'")
        return PlacedRow(others | {name: row[column] for name, column in taken.items()}, place)

    def check(self, optional: Collection[str] = ()) -> None:
        """Raise ValueError if no row so far had a column of data.columns whose new name is not in `optional`."""
        for name, column in self.columns.items():
            if self._known and column not in self._known and name not in optional:
                hint = nearest(column, sorted(self._known))
                raise ValueError(f"data.columns={{{name}: {column}}}: no row has a column '{column}'; {hint}")


def to_chat(placed: PlacedRow, used: Collection[str] = ()) -> Chat:
    """Return a row of any schema as a chat.

    S1K: `question`, and `answer` with its `<think>…</think>`. Prompt and response: `prompt` as text or messages, and
    `response` or `completion` as text or one message. Messages: the response is the last trained answer of `messages`.

    Args:
        used: fields that a formula reads.

    Raises:
        ValueError: a field is missing, empty or of the wrong type; roles are out of order; or a field that matters
            would be ignored. The message names place and field.
    """
    row, place = placed
    schema = schema_of(row)
    if schema == "messages":
        prompt, response = _split(_messages(row["messages"], "messages", "assistant", place), place)
        prompt = _with_system(prompt, row, place)
    else:
        prompt, response = _prompt(row, schema, place), _response(row, schema, place)
    chat = Chat(prompt=prompt, response=response)
    if tools := tools_of(placed):
        chat["tools"] = tools
    _refuse_ignored(placed, NOT_IN_ROWS, used)
    _check_row_marks(placed, used)
    return chat


def to_prompt(placed: PlacedRow) -> list[Message]:
    """Return the messages before the answer of a row of any schema; the row needs no answer.

    Raises:
        ValueError: see `to_chat`.
    """
    row, place = placed
    schema = schema_of(row)
    if schema != "messages":
        prompt = _prompt(row, schema, place)
    else:
        messages = row["messages"]
        answered = isinstance(messages, list) and messages and _role(messages[-1]) == "assistant"
        prompt = _messages(messages, "messages", "assistant" if answered else "user", place)
        prompt = _with_system(_split(prompt, place)[0] if answered else prompt, row, place)
    _refuse_ignored(placed, NOT_IN_PROMPTS)
    return prompt


def tools_of(placed: PlacedRow) -> list[dict[str, Any]] | None:
    """Tools of a row, for the chat template.

    Raises:
        ValueError: `tools` is not a list of objects.
    """
    row, place = placed
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: field 'tools' is not JSON ({error})") from error
    if not is_given(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{place}: field 'tools' must be a list of objects, or its JSON, not {kind_of(tools)}")
    return tools


def schema_of(row: dict[str, Any]) -> str:
    """Prompt field of the row's schema. Without a prompt, the answer field decides; without both, it is `question`."""
    for field in SCHEMAS:
        if row.get(field) is not None:
            return field
    answered = (field for field in SCHEMAS if row.get(_answer_field(row, field)) is not None)
    return next(answered, "question")


def needs_answer(row: dict[str, Any]) -> bool:
    """Whether text must follow the thinking, as in S1K rows and after a reasoning field."""
    schema = schema_of(row)
    answers = row.get(_answer_field(row, schema))
    holder = answers[-1] if isinstance(answers, list) else row
    return schema == "question" or any(is_given(holder.get(name)) for name in REASONING)


def unused(row: dict[str, Any]) -> list[str]:
    """Non-empty columns that are neither in the row's schema nor metadata; fields of messages as `messages[].name`."""
    schema = schema_of(row)
    used = USED[schema]
    names = [name for name, value in row.items() if name not in used and is_given(value)]
    for field in (schema, _answer_field(row, schema)):
        if isinstance(messages := row.get(field), list):
            dicts = [message for message in messages if isinstance(message, dict)]
            further = {name for message in dicts for name in message if _is_unused(message, name)}
            names += [f"{field}[].{name}" for name in sorted(further)]
    return list(dict.fromkeys(names))


def final_answer(response: str) -> str:
    """Text after the thinking."""
    return response.rpartition(END_THINK)[2].strip()


def without_thinking(chat: Chat, place: str) -> Chat:
    """Return the chat with its answers after their thinking.

    Raises:
        ValueError: nothing follows the thinking of an answer.
    """

    def answer(text: str) -> str:
        if END_THINK not in text:
            return text
        if not (final := final_answer(text)):
            raise ValueError(f"{place}: data.thinking=drop, but nothing follows the thinking of an answer")
        return final

    prompt = [
        message | {"content": answer(message["content"])} if message["role"] == "assistant" else message
        for message in chat["prompt"]
    ]
    return chat | {"prompt": prompt, "response": answer(chat["response"])}


def with_thinking(thinking: str, answer: str) -> str:
    """Join thinking and answer as in S1K.

    Raises:
        ValueError: the answer is empty, or tags occur inside the thinking.
    """
    if not answer.strip():
        raise ValueError("the answer after the thinking is empty")
    return "\n".join(filter(None, [THINK, _without_tags(thinking), END_THINK, answer.lstrip("\r\n")]))


def system_of(row: dict[str, Any]) -> str | None:
    """System message in a field of the row, or None.

    Raises:
        ValueError: it is not text, or two fields differ.
    """
    texts = _texts(row, SYSTEM)
    if len({text.strip() for text in texts.values()}) > 1:
        raise ValueError(f"fields {' and '.join(map(repr, texts))} differ: keep one system message")
    return next(iter(texts.values()), None)


def is_given(value: Any) -> bool:
    """Whether a value is neither null nor an empty text, list or object."""
    return isinstance(value, int | float) or bool(value.strip() if isinstance(value, str) else value)


def kind_of(value: Any) -> str:
    """Type name of a value, for errors."""
    return "null" if value is None else type(value).__name__


def _answer_field(row: dict[str, Any], schema: str) -> str:
    answer = SCHEMAS[schema]
    return COMPLETION if answer == "response" and row.get(answer) is None and COMPLETION in row else answer


def _prompt(row: dict[str, Any], schema: str, place: str) -> list[Message]:
    """Messages before the answer, in a row whose answer is a separate field."""
    if schema == "prompt" and not isinstance(row.get("prompt"), str | None):
        prompt = _messages(row["prompt"], "prompt", "user", place)
    else:
        prompt = [Message(role="user", content=_text(row, schema, place))]
    return _with_system(prompt, row, place)


def _response(row: dict[str, Any], schema: str, place: str) -> str:
    field = _answer_field(row, schema)
    what = f"{place}: field '{field}'"
    if COMPLETION in row and field == "response" and is_given(row[COMPLETION]) and row[COMPLETION] != row[field]:
        raise ValueError(f"{what} and field '{COMPLETION}' differ: keep one of them")
    if schema == "prompt" and isinstance(row.get(field), list):
        if len(row[field]) != 1:
            raise ValueError(f"{what} has {len(row[field])} messages: it must be text, or one message of the assistant")
        _, response = _split(_messages(row[field], field, "assistant", place, first="assistant"), place)
    else:
        response = _text(row, field, place)
    response = _with_reasoning(row, response, what)
    _check_thinking(response, what, needed=schema == "question")
    return response


def _split(messages: list[Message], place: str) -> tuple[list[Message], str]:
    """Messages before the last trained answer, and that answer."""
    answers = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    last = max((i for i in answers if messages[i].get("trained", True)), default=None)
    if last is None:
        raise ValueError(f"{place}: no answer is trained on: each has 0 or false in {' or '.join(TRAINED)}")
    return messages[:last], messages[last]["content"]


def _with_system(messages: list[Message], row: dict[str, Any], place: str) -> list[Message]:
    try:
        system = system_of(row)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if system is None:
        return messages
    message = Message(role="system", content=_well_formed(system, f"{place}: the system message"))
    if not messages or messages[0]["role"] != "system":
        return [message, *messages]
    if messages[0]["content"].strip() != system.strip():
        name = next(name for name in SYSTEM if is_given(row.get(name)))
        raise ValueError(f"{place}: field '{name}' and the system message among the messages differ: keep one of them")
    return messages


def _with_reasoning(holder: dict[str, Any], answer: str, what: str) -> str:
    """Prepend the thinking in a reasoning field of the row or message to its answer."""
    texts = _texts(holder, REASONING, f"{what}: its ")
    if not texts:
        return answer
    for name, text in texts.items():
        _well_formed(text, f"{what}: its field '{name}'")
        try:
            texts[name] = _without_tags(text)
        except ValueError as error:
            raise ValueError(f"{what}: its field '{name}': {error}") from error
    thinking, *others = set(texts.values())
    if others:
        raise ValueError(f"{what}: its fields {', '.join(texts)} differ: keep one of them")
    if THINK not in answer and END_THINK not in answer:
        return with_thinking(thinking, answer)
    before = answer.rpartition(END_THINK)[0]
    own = before.partition(THINK)[2] if THINK in before else before
    if own.strip() != thinking:
        raise ValueError(f"{what} has a {THINK} that differs from field '{next(iter(texts))}'")
    return answer


def _texts(holder: dict[str, Any], fields: Sequence[str], prefix: str = "") -> dict[str, str]:
    """Non-empty values of these fields of a row or message; raises ValueError if one is not text."""
    texts = {name: holder[name] for name in fields if is_given(holder.get(name))}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{prefix}field '{name}' must be text, not {kind_of(text)}")
    return texts


def _refuse_ignored(placed: PlacedRow, meaningful: Collection[str], used: Collection[str] = ()) -> None:
    """Refuse columns that matter and would be ignored."""
    row, place = placed
    if names := [name for name in unused(row) if name in meaningful and name not in used]:
        raise ValueError(f"{place}: {_no_effect(names)}")


def _no_effect(names: Sequence[str]) -> str:
    subject = f"fields {', '.join(map(repr, names))} have" if names[1:] else f"field {names[0]!r} has"
    return f"{subject} no effect: drop the column, or use it in data.filter (training rows only)"


def _check_row_marks(placed: PlacedRow, used: Collection[str]) -> None:
    """Refuse marks of 0 on the row itself; a `loss` other than 0 or 1 is a measurement."""
    row, place = placed
    measured = isinstance(row.get("loss"), int | float) and row["loss"] not in (0, 1)
    marks = _marks(row, f"{place}: the row", {*used, "loss"} if measured else used)
    if names := [name for name, trained in marks.items() if not trained]:
        raise ValueError(f"{place}: {_no_effect(names)}")


def _without_tags(thinking: str) -> str:
    """Thinking without the tags around it; raises ValueError if tags remain."""
    text = thinking.strip()
    if text.startswith(THINK) and text.endswith(END_THINK):
        text = text.removeprefix(THINK).removesuffix(END_THINK).strip()
    if THINK in text or END_THINK in text:
        raise ValueError(f"{THINK} and {END_THINK} may only enclose all of the thinking")
    return text


def _text(row: dict[str, Any], field: str, place: str) -> str:
    if row.get(field) is None:
        found, names = "null" if field in row else "missing", listed(list(row))
        kinds = [CONVERTED[name] for name in row if name in CONVERTED]
        converter = f"; `python -m data.prepare {kinds[0]}` converts such rows" if kinds else ""
        raise ValueError(
            f"{place}: field '{field}' is {found}; a row needs question and answer, prompt and response (or "
            f"completion), or messages: map its columns by {_mapping(row)}. Its fields are: {names}{converter}"
        )
    if not isinstance(row[field], str):
        raise ValueError(f"{place}: field '{field}' must be text, not {kind_of(row[field])}")
    return _well_formed(row[field], f"{place}: field '{field}'")


def _mapping(row: dict[str, Any]) -> str:
    """Suggest a data.columns setting, with the row's columns where their names are common ones."""
    prompt = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), "QUESTION")
    answer = next((name for name in ANSWER_COLUMNS if row.get(name) is not None), "ANSWER")
    renamed = [f"{name}: {column}" for name, column in (("prompt", prompt), ("response", answer)) if name != column]
    return f"'data.columns={{{', '.join(renamed)}}}'"


def _check_thinking(answer: str, what: str, needed: bool = False) -> None:
    """Refuse thinking without an end; if `needed`, also missing thinking or a missing final answer."""
    begun, ended = answer.lstrip().startswith(THINK), END_THINK in answer
    if needed and not (begun and ended):
        advice = (
            "`python -m data.prepare gsm8k` converts rows of GSM8K"
            if "####" in answer
            else "rows without thinking need the fields `prompt` and `response`"
        )
        raise ValueError(f"{what} does not begin with {THINK}…{END_THINK}; {advice}")
    if begun and not ended:
        raise ValueError(f"{what} begins with {THINK} and has no {END_THINK}")
    if needed and not final_answer(answer):
        raise ValueError(f"{what} has no answer after {END_THINK}")


def _well_formed(text: str, what: str) -> str:
    if not text.strip():
        raise ValueError(f"{what} is empty")
    if len(text) > MAX_TEXT:
        raise ValueError(f"{what} has {len(text):,} characters, more than {MAX_TEXT:,}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{what} is not valid Unicode: it has a lone surrogate")
    return text


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _messages(messages: Any, field: str, last: str, place: str, first: str = "user") -> list[Message]:
    """Check messages: an optional system message, then user and assistant in turn, ending with role `last`."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        found = "an empty one" if messages == [] else kind_of(messages)
        or_text = " or text" if field == "prompt" else ""
        raise ValueError(f"{place}: field '{field}' must be a non-empty list of messages{or_text}, not {found}")
    expected, made = first, []
    for number, message in enumerate(messages, start=1):
        role, what = _role(message), f"{place}: message {number} of '{field}'"
        if role == "system" and not is_given(_joined(message.get("content"), what)):
            _check_fields(message, what)
            continue
        if role == expected:
            expected = "assistant" if role == "user" else "user"
        elif role != "system" or made:
            converted = " (`python -m data.prepare sharegpt` converts ShareGPT's)" if role in (None, "human") else ""
            raise ValueError(
                f"{what} has role {reprlib.repr(role)}, expected {expected!r}: a system message may come first, then "
                f"user and assistant in turn, each an object with role and content{converted}"
            )
        made.append(_message(message, what))
    if not made:
        raise ValueError(f"{place}: the last of '{field}' must be the {last}'s, but it has no message with text")
    if (role := made[-1]["role"]) != last:
        raise ValueError(f"{place}: the last of '{field}' must be the {last}'s, it is the {role}'s")
    return made


def _message(message: dict[str, Any], what: str) -> Message:
    _check_fields(message, what)
    content = _joined(message.get("content"), what)
    if not isinstance(content, str):
        raise ValueError(f"{what} needs text: field 'content' must be text, not {kind_of(content)}")
    content = _well_formed(content, what)
    if message["role"] != "assistant":
        return Message(role=message["role"], content=content)
    content = _with_reasoning(message, content, what)
    _check_thinking(content, what)
    made = Message(role="assistant", content=content)
    if not _is_trained(message, what):
        made["trained"] = False
    return made


def _check_fields(message: dict[str, Any], what: str) -> None:
    """Refuse fields of a message that matter and would be ignored."""
    answer = message["role"] == "assistant"
    if more := [name for name in NOT_IN_MESSAGES if is_given(message.get(name))]:
        raise ValueError(f"{what} has {listed(more)}: only text is trained on")
    if more := [name for name in REASONING if is_given(message.get(name)) and not answer]:
        raise ValueError(f"{what} has {listed(more)}, which only an assistant's message may have")
    for name, harmless in NO_MARKS.items():
        if answer and is_given(message.get(name)) and message[name] != harmless:
            value = reprlib.repr(message[name])
            raise ValueError(f"{what} has {name}={value}, which has no effect: mark answers by {', '.join(TRAINED)}")


def _is_unused(message: dict[str, Any], name: str) -> bool:
    """Whether nothing reads this field of a message; only an assistant's marks are read."""
    if name in TRAINED and message.get("role") != "assistant":
        return message[name] not in (None, 0)
    return name not in IN_MESSAGES and is_given(message[name])


def _joined(content: Any, what: str) -> Any:
    """Join content that is a list of text parts; return other content unchanged."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{what} has a part of type {reprlib.repr(kind)}: only text is trained on")
        if more := [name for name, value in part.items() if name not in IN_PARTS and is_given(value)]:
            raise ValueError(f"{what} has a part with {listed(more)}: only its text is trained on")
    return "".join(part["text"] for part in content)


def _is_trained(message: dict[str, Any], what: str) -> bool:
    marks = _marks(message, what)
    if len(set(marks.values())) > 1:
        both = ", ".join(f"{name}={message[name]}" for name in marks)
        raise ValueError(f"{what}: {both} contradict each other")
    return all(marks.values())


def _marks(holder: dict[str, Any], what: str, unchecked: Collection[str] = ()) -> dict[str, bool]:
    """Values of the TRAINED fields of a message or row.

    Raises:
        ValueError: a value is not 0, 1, true or false.
    """
    marks = {name: holder[name] for name in TRAINED if holder.get(name) is not None and name not in unchecked}
    for name, value in marks.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise ValueError(f"{what} has {name}={reprlib.repr(value)}: must be 0, 1, true or false")
    return {name: bool(value) for name, value in marks.items()}
