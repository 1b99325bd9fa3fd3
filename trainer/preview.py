"""Rows as a step trains on them: their template, trained and masked tokens, cuts and padding."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain, groupby
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from data import Batch, TokenRows, turn_end
from data.packing import single_rows
from data.terminal import printable

STYLES = {"context": "dim", "trained": "green", "padding": "blue", "masked": "black on yellow"}
ROLES = {"context": "prompt", "trained": "response", "padding": "padding"}
MARKS = {"trained": "⟦⟧", "padding": "{}"}
MASK = "▒"
CHARACTERS = 2000  # of a text that is shown whole


def print_preview(
    console: Console,
    micro_batches: Iterable[Batch],
    tokenizer: PreTrainedTokenizerBase,
    rows: TokenRows | None,
    count: int,
    characters: int = CHARACTERS,
) -> None:
    """Print some rows of micro-batches, each as it is and with its masks.

    Args:
        rows: the table of the rows, for their places; None for a stream.
        count: number of rows to print, spread evenly: neighbours have similar t.
        characters: of each text; the middle of a longer one is left out. 0 leaves out nothing.
    """
    marked = console.color_system is None
    console.print(_legend(marked), soft_wrap=True)
    singles = list(chain.from_iterable(map(single_rows, micro_batches)))
    count = min(count, len(singles))
    places = [(2 * number + 1) * len(singles) // (2 * count) for number in range(count)]
    for number, row in enumerate((singles[place] for place in places), 1):
        tokens = _tokens(row)
        console.print(Text(f"\nrow {number}: {_heading(row, rows, tokens)}", style="bold"), soft_wrap=True)
        for name, masks in (("clean", False), ("with masks", True)):
            text = _text(tokens, tokenizer, masks, marked)
            console.print(Text(f"{name}:", style="italic"), _clip(text, characters), sep="\n", soft_wrap=True)


def token_table(row: Batch, tokenizer: PreTrainedTokenizerBase, positions: int) -> Table:
    """The first positions of a batch of one row, a line each: token, role, whether it is trained on and masked.

    Args:
        positions: number of lines; 0 takes all attended positions.
    """
    ends, tokens = {tokenizer.eos_token_id, turn_end(tokenizer)}, _tokens(row)
    shown = tokens[: positions or None]
    rest = f"{len(tokens) - len(shown)} more positions" if len(shown) < len(tokens) else None
    table = Table("position", "token", "role", "trained on", "masked", box=None, caption=rest, caption_justify="left")
    for place, token in enumerate(shown):
        role = "end" if token.kind == "trained" and token.id in ends else ROLES[token.kind]
        flags = ["yes" if flag else "no" for flag in (token.trained, token.masked)]
        cells = map(Text, (str(place), repr(tokenizer.decode([token.id])), role, *flags))  # brackets are no markup
        table.add_row(*cells, style=STYLES["masked" if token.masked else token.kind])
    return table


def _legend(marked: bool) -> Text:
    if marked:
        return Text(f"⟦trained tokens⟧, {MASK} a masked one, {{padding that is trained on}}")
    text = Text()
    for kind, words in zip(STYLES, ("context", "trained", "padding that is trained on", "masked"), strict=True):
        text.append(words, STYLES[kind]).append("  ")
    return text


class _Token(NamedTuple):
    """An attended position of a row."""

    id: int
    kind: str  # context, trained or padding
    trained: bool
    masked: bool


def _tokens(row: Batch) -> list[_Token]:
    """The attended positions of a batch of one row."""
    attended = row["attention_mask"][0].bool()
    hidden = row["x_t"] != row["input_ids"]  # an objective may train on tokens that it does not mask
    columns = (values[0][attended].tolist() for values in (row["input_ids"], row["maskable"], hidden))
    own = int(row["row_tokens"][0])
    return [
        _Token(token, "padding" if place >= own else "trained" if trained else "context", trained, masked)
        for place, (token, trained, masked) in enumerate(zip(*columns, strict=True))
    ]


def _heading(row: Batch, rows: TokenRows | None, tokens: list[_Token]) -> str:
    sample = int(row["sample_index"][0])
    count = Counter(token.kind for token in tokens)
    place = "" if rows is None else f"{rows.place(sample)}: "
    text = f"{place}{count['context']} tokens of context, {count['trained']} trained"
    text += f", {sum(token.masked for token in tokens)} masked"
    if "t" in row:  # not every objective has times
        low, high = torch.aminmax(row["t"][0])
        text += f" at t = {low:.2f}" if low == high else f" at t = {low:.2f} to {high:.2f}"
    if rows is not None and rows.cut[sample]:
        text += ", cut by data.truncation=right"
    elif rows is not None and (lost := int(rows.lengths[sample] - row["row_tokens"][0])) > 0:
        text += f", {lost} left out by the batch's cutoff"
    if count["padding"]:
        text += f", {count['padding']} of padding behind"
    unattended = int((row["attention_mask"][0] == 0).sum())
    return text + (f", {unattended} not attended before" if unattended else "")


def _text(tokens: list[_Token], tokenizer: PreTrainedTokenizerBase, masks: bool, marked: bool) -> Text:
    """Tokens in the styles of their kinds, or between marks for a terminal without colours.

    Args:
        masks: whether masked tokens are hidden.
    """
    text = Text()
    for kind, run in groupby(tokens, key=lambda token: "masked" if masks and token.masked else token.kind):
        ids = [token.id for token in run]
        if kind == "masked":
            text.append(MASK * len(ids), STYLES[kind])
            continue
        words = tokenizer.decode(ids) if kind != "padding" else f"{tokenizer.decode(ids[:1])} × {len(ids)}"
        left, right = MARKS.get(kind, ("", "")) if marked else ("", "")
        text.append(f"{left}{printable(words)}{right}", STYLES[kind])
    return text


def _clip(text: Text, characters: int) -> Text:
    """Leave out the middle of a text that is longer than so many characters."""
    if not characters or len(text) <= characters:
        return text
    half = characters // 2
    left_out = Text(f" … {len(text) - 2 * half:,} characters … ", style="italic")
    return text[:half] + left_out + text[-half:]
