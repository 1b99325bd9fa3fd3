"""Which rows are trained on: filters, duplicates, overlap with an evaluation set, subsets."""

import ast
import math
import re
import reprlib
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any

import numpy as np
from simpleeval import InvalidExpression, NameNotDefined

from data.chat import Chat, Message
from data.errors import listed, nearest
from data.evaluator import FUNCTIONS, Evaluator, check_syntax

SHINGLE = 5  # words of which near duplicates must share most
PERMUTATIONS = 128  # of MinHash
NOT_COMPUTED = (
    *(InvalidExpression, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    *(RecursionError, MemoryError),
)
VALUES = {bool: "true or false", float: "a finite number"}
CHINESE = "\u3040-\u30ff\u3400-\u9fff"  # and Japanese: a character is a word
WORD = re.compile(rf"[{CHINESE}]|[^\W{CHINESE}]+|[-+*/=<>^%]")


class Expression:
    """A formula over the fields of a row, such as `source == 'math' and thinking_tokens < 1500`.

    data/README.md lists what it may hold. It cannot reach beyond the row, change it, or take long.

    Args:
        setting: what it was given as.
        kind: of its value, bool or float.

    Attributes:
        names: the fields that it reads.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """

    def __init__(self, text: str, setting: str, kind: type):
        self.kind, self.said = kind, f"{setting}={text!r}"
        try:
            self._parsed = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{self.said} cannot be read: {getattr(error, 'msg', error)}") from error
        try:
            check_syntax(self._parsed)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.said}: {error}") from error
        names = [node for node in ast.walk(self._parsed) if isinstance(node, ast.Name)]
        own = {node.id for node in names if not isinstance(node.ctx, ast.Load)}  # of comprehensions
        self.names = {node.id for node in names} - own - FUNCTIONS.keys()
        self._known, self._failure, self._worked = set(), None, False
        self._evaluator = Evaluator()

    def __call__(self, row: dict[str, Any], place: str) -> bool | float:
        """Its value for a row.

        Raises:
            ValueError: it names a field that the row does not have, or cannot be computed there.
        """
        self._evaluator.names = row
        self._known.update(row)
        try:
            value = self._evaluator.eval("", previously_parsed=self._parsed)
            wanted = isinstance(value, bool) if self.kind is bool else _is_number(value)
            if not wanted:
                raise TypeError(f"must be {VALUES[self.kind]}, it is {reprlib.repr(value)}")
        except NOT_COMPUTED as error:
            said = str(error).rstrip(".") or type(error).__name__
            reason = f"no field {error.name}" if isinstance(error, NameNotDefined) else said
            fields = listed([name for name in row if name.isidentifier()])
            failure = ValueError(f"{place}: {self.said}: {reason}. Fields of the row: {fields}")
            self._failure = self._failure or failure
            raise failure from error
        self._worked = True
        return self.kind(value)

    def check(self) -> None:
        """Refuse what is wrong with the formula, and not with the rows.

        Raises:
            ValueError: of the rows so far none has a field that it names, or it has a value for none.
        """
        for name in sorted(self.names - self._known if self._known else ()):
            hint = nearest(name, sorted(self._known))
            raise ValueError(f"{self.said}: no row has a field {name} (a text needs quotes, {name!r}); {hint}")
        if self._failure and not self._worked:
            raise self._failure


class Duplicates:
    """Finds texts that came before.

    Args:
        kind: `exact`, but for case and spaces · `near`, with an estimated Jaccard similarity of their SHINGLE-word
            sequences of at least `similarity` (MinHash, Broder 1997; the estimate's deviation is 0.04 or less).

    Raises:
        ValueError: `near` without datasketch.
    """

    def __init__(self, kind: str, similarity: float):
        self.kind, self.similarity, self.seen = kind, similarity, {}
        if kind == "near":
            try:
                from datasketch import MinHash, MinHashLSH
            except ImportError as error:
                raise ValueError("data.drop_duplicates=near needs datasketch: pip install 'diffllm[dedup]'") from error
            # Buckets find what is about as similar as they are made for: made for less, they miss next to nothing.
            self._min_hash, self._candidates = MinHash, MinHashLSH(max(0.1, similarity - 0.3), PERMUTATIONS)
            self._sketches = {}

    def find(self, chat: Chat, place: str) -> str | None:
        """`as` and the place of an earlier text like this one; if there is none, this one is remembered."""
        text = "\n".join(f"{message['role']} {message['content']}" for message in chat["prompt"])
        text = f"{text}\nassistant {chat['response']}"
        digest = sha256(" ".join(text.lower().split()).encode()).digest()
        if earlier := self.seen.get(digest):
            return f"as {earlier}"
        if self.kind == "near":
            sketch = self._min_hash(PERMUTATIONS)
            sketch.update_batch([" ".join(shingle).encode() for shingle in n_grams(words_of(text), SHINGLE)])
            for other in self._candidates.query(sketch):
                if sketch.jaccard(self._sketches[other]) >= self.similarity:
                    return f"as {other}"
            self._candidates.insert(place, sketch)
            self._sketches[place] = sketch
        self.seen[digest] = place
        return None


class Overlap:
    """Finds chats that share a sequence of n words with a question of an evaluation set, or all of a shorter message.

    What system messages say is not looked at: it may be everyone's.
    """

    def __init__(self, questions: Iterable[tuple[list[Message], str]], n: int):
        self.n, self.places = n, {}
        for messages, place in questions:
            for message in messages:
                if message["role"] != "system":
                    for gram in n_grams(words_of(message["content"]), n):
                        self.places.setdefault(hash(gram), place)

    def find(self, chat: Chat) -> str | None:
        """The place of an evaluation question that a chat overlaps with."""
        said = [message["content"] for message in chat["prompt"] if message["role"] != "system"]
        grams = (gram for text in [*said, chat["response"]] for gram in n_grams(words_of(text), self.n))
        return next((self.places[key] for gram in grams if (key := hash(gram)) in self.places), None)


def n_grams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    """All sequences of n words; of fewer words the whole, and of none nothing."""
    return (tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1)) if words)


def words_of(text: str) -> list[str]:
    """Words, numbers and signs of arithmetic in lower case, without punctuation."""
    return WORD.findall(text.lower())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def subset(rows: int, size: float, seed: int) -> np.ndarray:
    """Which of the rows a random subset has, in their order; a smaller subset of the same seed is part of a larger one.

    Args:
        size: a share up to 1, or a number of rows above.

    Raises:
        ValueError: there are fewer rows.
    """
    count = round(size * rows) if size <= 1 else int(size)
    if not 0 < count <= rows:
        raise ValueError(f"data.subset={size:g}: that is {count} of {rows} rows; give a share, or 2 to {rows}")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:count])
