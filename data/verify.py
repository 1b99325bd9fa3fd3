"""Whether a response has the right answer."""

import re
from decimal import Decimal
from typing import Any

from data import generated
from data.chat import final_answer, to_chat
from data.readers import PlacedRow

NUMBER = re.compile(r"[-+]?\$?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?", re.ASCII)


def is_correct(row: dict[str, Any], response: str) -> bool:
    """Whether a response to a row ends in its answer: by the verifier of its task, else as text or as a number.

    Args:
        row: a training row.
    """
    given = final_answer(response)
    if str(row.get("source")).startswith(generated.PREFIX):
        return generated.score(row, given) == 1
    return _normal(given) == _normal(final_answer(reference(row)))


def check_verifiable(placed: PlacedRow) -> None:
    """Refuse a row to which no answer would be right, before any is asked for.

    Raises:
        ValueError: its own answer is not right, or it cannot be judged; the message names the place.
    """
    row, place = placed
    try:
        right = is_correct(row, reference(row))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not right:
        raise ValueError(f"{place}: the row's own answer is not right by the verifier of {row.get('source')}")


def reference(row: dict[str, Any]) -> str:
    """The answer that a row has, as it is trained on.

    Raises:
        ValueError: see `data.chat.to_chat`.
    """
    return to_chat(PlacedRow(row, "the row"))["response"]


def _normal(answer: str) -> str | Decimal:
    """A number as itself, whatever its separators, currency sign or final stop; other text as it is."""
    text = answer.strip().removesuffix(".")
    return Decimal(re.sub(r"[$,]", "", text)) if NUMBER.fullmatch(text) else text
