"""Infilling: fill slots inside a text.

A slot is in the middle of a text, so nothing ends it: end-of-sequence, mask and the tokenizer's other special tokens
are forbidden in it, and stop sequences do not count. The text before the first slot is the canvas's prompt, after which
blocks begin.
"""

import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from sampling.batch import Denoiser, attention_block_of
from sampling.canvas import Canvas, Tokens, ids_without_token
from sampling.config import SamplingConfig
from sampling.events import StepEvent
from sampling.likelihood import Score, score_positions
from sampling.sampler import fill

_SLOT = re.compile(r"<\|mask\b([^|]*)\|>")
_LENGTHS = re.compile(r":([0-9]+)(?:-([0-9]+))?")
MOST_LENGTHS = 256  # lengths to try of one slot


@dataclass(frozen=True)
class SlottedCanvas(Canvas):
    """A canvas with slots."""

    slots: tuple[range, ...] = ()  # positions of each slot


@dataclass(frozen=True)
class Template:
    """Text with slots.

    Raises:
        ValueError: no slot, pieces that do not alternate with slots, a slot without lengths or with one below 1, or
            several slots of unknown length.
    """

    pieces: tuple[str, ...]  # text before, between and after the slots
    slots: tuple[tuple[int, ...], ...]  # lengths in tokens to try for each slot

    def __post_init__(self) -> None:
        if not self.slots:
            raise ValueError("the template has no slot: write <|mask:12|> where 12 tokens are to be filled in")
        if len(self.pieces) != len(self.slots) + 1:
            raise ValueError(f"{len(self.pieces)} pieces around {len(self.slots)} slots: give one more than slots")
        for lengths in self.slots:
            if not lengths or min(lengths) < 1:
                raise ValueError(f"a slot has lengths {list(lengths)}: give at least one, each at least 1 token")
        if (unknown := sum(len(lengths) > 1 for lengths in self.slots)) > 1:
            raise ValueError(f"{unknown} slots are of unknown length: give all but one of them one length")

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Read a text with slots such as `<|mask:12|>` of 12 tokens, or `<|mask:4-16|>` of 4 to 16.

        Raises:
            ValueError: a slot that is not of this form, or see `Template`.
        """
        pieces, slots = _SLOT.split(text)[0::2], []
        for slot in _SLOT.finditer(text):
            lengths = _LENGTHS.fullmatch(slot[1])
            first, last = (int(lengths[1]), int(lengths[2] or lengths[1])) if lengths else (0, 0)
            if not 1 <= first <= last:
                raise ValueError(
                    f"slot {slot[0]}: write <|mask:12|> for 12 tokens, or <|mask:4-16|> for 4 to 16; at least 1"
                )
            if last - first >= MOST_LENGTHS:
                raise ValueError(f"slot {slot[0]}: {last - first + 1:,} lengths to try, at most {MOST_LENGTHS} can be")
            slots.append(tuple(range(first, last + 1)))
        return cls(tuple(pieces), tuple(slots))

    def canvases(self, tokenizer: PreTrainedTokenizerBase, mask: int, row_id: int = 0) -> list[SlottedCanvas]:
        """One canvas for each length to try, the shortest first, all with the same row_id.

        Raises:
            ValueError: the mask token is in the text.
        """
        pieces = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in self.pieces]
        for text, piece in zip(self.pieces, pieces, strict=True):
            if mask in piece:
                raise ValueError(f"the mask token {tokenizer.decode([mask])!r} is in the text {text!r}: take it out")
        return [
            _join(pieces, lengths, mask, row_id)
            for lengths in itertools.product(*(sorted(set(lengths)) for lengths in self.slots))
        ]


def _join(pieces: Sequence[Sequence[int]], lengths: Sequence[int], mask: int, row_id: int) -> SlottedCanvas:
    tokens, slots = [*pieces[0]], []
    for length, piece in zip(lengths, pieces[1:], strict=True):
        slots.append(range(len(tokens), len(tokens) + length))
        tokens += [*[mask] * length, *piece]
    return SlottedCanvas(tokens, len(pieces[0]), row_id, tuple(slots))


@dataclass(frozen=True)
class Infilled:
    """A template whose slots are filled."""

    text: str  # the whole text; the template's pieces are kept as written, whatever the tokenizer decodes
    slots: list[str]  # text of each slot
    tokens: list[int]  # [L] of the whole text
    length: int  # number of tokens in all slots
    nfe: int  # forwards of the model with this template, at each length tried and for its bound
    scores: dict[int, Score]  # of the slots' tokens given the others, by length, if several were tried


def infill(
    model: Denoiser,
    tokenizer: PreTrainedTokenizerBase,
    prefix: str,
    suffix: str,
    length: int | Sequence[int],
    config: SamplingConfig,
    special: Tokens,
    *,
    row_id: int = 0,
    samples: int = 64,
) -> Infilled:
    """Fill in tokens between a prefix and a suffix, which are raw text without chat template or slots.

    Args:
        length: number of tokens, or several numbers, from which `infill_templates` chooses.
        config, special, samples: see `infill_templates`.
        row_id: number of the row, which keys its draws.

    Raises:
        ValueError: no length, a length below 1, or the mask token in prefix or suffix.
    """
    lengths = (length,) if isinstance(length, int) else tuple(length)
    template = Template((prefix, suffix), (lengths,))
    [infilled] = infill_templates(model, tokenizer, [template], config, special, row_ids=[row_id], samples=samples)
    return infilled


def infill_templates(
    model: Denoiser,
    tokenizer: PreTrainedTokenizerBase,
    templates: Sequence[Template],
    config: SamplingConfig,
    special: Tokens,
    *,
    row_ids: Sequence[int] | None = None,
    samples: int = 64,
    on_step: Callable[[StepEvent], object] | None = None,
) -> list[Infilled]:
    """Fill in templates, `config.batch_size` canvases at once.

    A slot with several lengths is filled at each of them. The length whose tokens have the highest bound on their
    log-likelihood given all other tokens, in nats a token, is taken; of equal ones the shortest. The bound
    (`sampling.likelihood`) covers the tokens in every order, while their probabilities when committed favour the
    sampler's own order. A slot that is too long scores low, because the model expects an end-of-sequence token in it.
    The bound ignores how likely a length is, and scores easily guessed text such as a run of blanks high.

    Warns if the model attends by blocks and text stands in a later block than a slot.

    Args:
        templates: each fits the model's context with its slots at their longest.
        config: `max_new_tokens`, `min_new_tokens` and settings about ends are not used.
        row_ids: numbers of the templates, which key their draws; by default 0 … N-1.
        samples: masks drawn for each of several lengths, one forwarded row each; even.
        on_step: called after each step of each canvas. Those of a template differ in length.

    Raises:
        ValueError: the mask token is in a text, or `samples` is out of range.
    """
    barred = {*special.forbidden, *special.eos, special.mask, *tokenizer.all_special_ids}
    barred |= {*ids_without_token(tokenizer, model.vocab_size)}
    inside = replace(special, eos=(), stop=(), is_complete=None, forbidden=tuple(sorted(barred)))
    row_ids = range(len(templates)) if row_ids is None else row_ids
    tried = [
        template.canvases(tokenizer, special.mask, row_id) for template, row_id in zip(templates, row_ids, strict=True)
    ]
    if (block := attention_block_of(model)) and any(_hides_text(canvas, block) for canvas in itertools.chain(*tried)):
        warnings.warn(
            f"the model attends by blocks of {block}: slots do not see the text of later blocks", stacklevel=2
        )
    filled = {id(row.canvas): row for row in fill(model, itertools.chain(*tried), config, inside, on_step=on_step)}

    infilled = []
    for template, canvases in zip(templates, tried, strict=True):
        rows = [(filled[id(canvas)].tokens, [*itertools.chain(*canvas.slots)]) for canvas in canvases]
        best, scores = 0, []
        if len(rows) > 1:
            scores = score_positions(model, rows, special, samples, config.seed, config.batch_size)
            best = max(range(len(rows)), key=lambda i, scores=scores: scores[i].per_token)
        tokens, at = rows[best]
        texts = [_decode(tokenizer, tokens, slot) for slot in canvases[best].slots]
        text = "".join(itertools.chain(*zip(template.pieces, [*texts, ""], strict=True)))
        nfe = sum(filled[id(canvas)].nfe for canvas in canvases) + sum(score.nfe for score in scores)
        infilled.append(Infilled(text, texts, tokens, len(at), nfe, {score.tokens: score for score in scores}))
    return infilled


def _hides_text(canvas: SlottedCanvas, block: int) -> bool:
    """Whether text stands in a later block than the first slot's first token."""
    text = {*range(len(canvas.tokens))}.difference(*canvas.slots)
    return max(text, default=0) // block > canvas.slots[0].start // block


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], slot: range) -> str:
    """Text of a slot, decoded with the text before it: SentencePiece drops the blank of a first token."""
    before = tokenizer.decode(tokens[: slot.start], clean_up_tokenization_spaces=False)
    return tokenizer.decode(tokens[: slot.stop], clean_up_tokenization_spaces=False)[len(before) :]
