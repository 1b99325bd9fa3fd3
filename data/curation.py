"""Select training rows: formulas, duplicates, overlaps with an evaluation set, subsets."""

import ast
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any

import numpy as np
from simpleeval import InvalidExpression, NameNotDefined

from data.chat import Chat, Message
from data.errors import listed, nearest
from data.evaluator import FUNCTIONS, Evaluator, check_syntax
from data.token_rows import TokenRows

SHINGLE = 5  # words of the sequences that near duplicates share
PERMUTATIONS = 128  # of MinHash
NOT_COMPUTED = (
    *(InvalidExpression, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    *(RecursionError, MemoryError),
)
VALUES = {bool: "true or false", float: "a finite number"}
CHINESE = "\u3040-\u30ff\u3400-\u9fff"  # and Japanese: each character counts as a word
WORD = re.compile(rf"[{CHINESE}]|[^\W{CHINESE}]+|[-+*/=<>^%]")


class Expression:
    """A formula over the fields of a row, such as `source == 'math' and thinking_tokens < 1500`.

    data/README.md lists the allowed syntax. A formula reads only the row, changes nothing, and takes bounded time.

    Args:
        setting: name of the setting, for errors.
        kind: type of the value, bool or float.

    Attributes:
        names: fields that the formula reads.

    Raises:
        ValueError: the formula has a syntax error or a part that is not allowed.
    """

    def __init__(self, text: str, setting: str, kind: type):
        self.kind, self.shown = kind, f"{setting}={text!r}"
        try:
            self._parsed = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{self.shown} cannot be read: {getattr(error, 'msg', error)}") from error
        try:
            check_syntax(self._parsed)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.shown}: {error}") from error
        names = [node for node in ast.walk(self._parsed) if isinstance(node, ast.Name)]
        variables = {node.id for node in names if not isinstance(node.ctx, ast.Load)}  # of comprehensions
        self.names = {node.id for node in names} - variables - FUNCTIONS.keys()
        self._known, self._failure, self._worked = set(), None, False
        self._evaluator = Evaluator()

    def __call__(self, row: dict[str, Any], place: str) -> bool | float:
        """Compute the value for a row.

        Raises:
            ValueError: the row lacks a field, the computation fails, or the value has the wrong type.
        """
        self._evaluator.names = row
        self._known.update(row)
        try:
            value = self._evaluator.eval("", previously_parsed=self._parsed)
            if not (isinstance(value, bool) if self.kind is bool else _is_number(value)):
                raise TypeError(f"must be {VALUES[self.kind]}, not {reprlib.repr(value)}")
        except NOT_COMPUTED as error:
            message = str(error).rstrip(".") or type(error).__name__
            reason = f"no field {error.name}" if isinstance(error, NameNotDefined) else message
            fields = listed([name for name in row if name.isidentifier()])
            failure = ValueError(f"{place}: {self.shown}: {reason}. Fields of the row: {fields}")
            self._failure = self._failure or failure
            raise failure from error
        self._worked = True
        return self.kind(value)

    def check(self) -> None:
        """Raise ValueError if a field of the formula is in no row so far, or the formula failed on every row."""
        for name in sorted(self.names - self._known if self._known else ()):
            hint = nearest(name, sorted(self._known))
            raise ValueError(f"{self.shown}: no row has a field {name} (quote a text: {name!r}); {hint}")
        if self._failure and not self._worked:
            raise self._failure


class Duplicates:
    """Finds chats that equal or resemble an earlier one.

    Args:
        kind: `exact` ignores case and spaces · `near` needs an estimated Jaccard similarity of SHINGLE-word sequences
            of at least `similarity` (MinHash, Broder 1997; standard deviation at most 0.04).

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
            # LSH misses pairs near its threshold: set it lower, then compare the similarity itself.
            self._min_hash, self._candidates = MinHash, MinHashLSH(max(0.1, similarity - 0.3), PERMUTATIONS)
            self._sketches = {}

    def find(self, chat: Chat, place: str) -> str | None:
        """Return `as PLACE` of an earlier equal or similar chat; otherwise remember this one and return None."""
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
    """Finds chats that share n successive words with an evaluation question, or all words of a shorter message.

    Ignores system messages, which many rows share.
    """

    def __init__(self, questions: Iterable[tuple[list[Message], str]], n: int):
        self.n, self.places = n, {}
        for messages, place in questions:
            for message in messages:
                if message["role"] != "system":
                    for gram in n_grams(words_of(message["content"]), n):
                        self.places.setdefault(hash(gram), place)

    def find(self, chat: Chat) -> str | None:
        """Place of an evaluation question that overlaps with the chat, or None."""
        texts = [message["content"] for message in chat["prompt"] if message["role"] != "system"]
        grams = (gram for text in [*texts, chat["response"]] for gram in n_grams(words_of(text), self.n))
        return next((self.places[key] for gram in grams if (key := hash(gram)) in self.places), None)


def n_grams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    """Sequences of n successive words; one of all words if they are fewer."""
    return (tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1)) if words)


def words_of(text: str) -> list[str]:
    """Words, numbers and arithmetic signs in lower case, without punctuation."""
    return WORD.findall(text.lower())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def held_out(rows: TokenRows, share: float, seed: int) -> np.ndarray:
    """[rows] whether a row is held out. Rows with equal prompts stay together.

    In each source the prompts are ordered by a digest of their tokens and the seed, and held out until the share of its
    rows is reached: at least one prompt, but not all.

    Raises:
        ValueError: no source has two prompts.
    """
    key, column = str(seed).encode(), rows.column("source").tolist()
    prompts = (rows.ids(row)[:length] for row, length in enumerate(rows.prompt_lengths))
    digests = [sha256(key + prompt.tobytes()).digest() for prompt in prompts]
    sources: dict[int, Counter[bytes]] = {}
    first = {}  # source of each prompt
    for digest, source in zip(digests, column, strict=True):
        sources.setdefault(first.setdefault(digest, source), Counter())[digest] += 1
    chosen: set[bytes] = set()
    for counts in sources.values():
        order = sorted(counts)
        through = np.cumsum([counts[digest] for digest in order])
        chosen |= {*order[: min(np.searchsorted(through, share * through[-1]) + 1, len(order) - 1)]}
    if not chosen:
        raise ValueError(f"data.val_split={share:g}: all rows of a source have the same prompt; give data.val_files")
    return np.array([digest in chosen for digest in digests])


def subset(rows: int, size: float, seed: int) -> np.ndarray:
    """Sorted indices of a random subset of rows. With the same seed, larger subsets contain smaller ones.

    Args:
        size: a share up to 1, or a number of rows above 1.

    Raises:
        ValueError: the subset is empty or larger than the rows.
    """
    count = round(size * rows) if size <= 1 else int(size)
    if not 0 < count <= rows:
        raise ValueError(
            f"data.subset={size:g}: selects {count} of {rows} rows; give a share in (0, 1], or 2 to {rows}"
        )
    return np.sort(np.random.default_rng(seed).permutation(rows)[:count])
