"""Settings of the reverse process."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sampling.policies import ADAPTIVE, ALGS, CONFIDENCES, ORDER_TEMP, SCHEDULED, USE_ENTROPY

LLADA_ALGS = {"random": "origin", "low_confidence": "maskgit_plus"}
CACHES = ("auto", "none", "block", "prefix", "dual", "delayed")
CHOICES = {
    "alg": (*ALGS, *LLADA_ALGS),
    "transfer": (*SCHEDULED, *ADAPTIVE),
    "confidence": tuple(CONFIDENCES),
    "eos_confidence": ("keep", "suppress"),
    "cache": CACHES,
    "compile": ("auto", "true", "false"),
}
LARGEST = 2**63 - 1
SMALLEST_TEMPERATURE = 1e-6  # logits over less could overflow


class Range(NamedTuple):
    """Values that a number may have."""

    text: str
    holds: Callable[[float], bool]


RANGES = {
    **dict.fromkeys(
        ("max_new_tokens", "steps", "block_length", "top_k", "cache_refresh", "batch_size"),
        Range("at least 1", lambda value: value >= 1),
    ),
    **dict.fromkeys(("min_new_tokens", "cfg_scale", "seed"), Range("at least 0", lambda value: value >= 0)),
    **dict.fromkeys(
        ("temperature", "alg_temp"),
        Range(f"0, or at least {SMALLEST_TEMPERATURE}", lambda value: value == 0 or value >= SMALLEST_TEMPERATURE),
    ),
    **dict.fromkeys(("top_p", "threshold"), Range("in (0, 1]", lambda value: 0 < value <= 1)),
    **dict.fromkeys(("factor", "entropy_bound"), Range("positive", lambda value: value > 0)),
    "eps": Range("in (0, 1)", lambda value: 0 < value < 1),
    "remask": Range("in [0, 1)", lambda value: 0 <= value < 1),
}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def used_with(default: Any, **others: tuple[str, ...]) -> Any:
    """A field that does nothing unless other fields have one of these values."""
    return field(default=default, metadata={"used_with": others})


@dataclass
class SamplingConfig:
    """Settings of the reverse process. The modules that read them explain each policy and name its paper.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    max_new_tokens: int = 256  # masked positions appended to the prompt
    min_new_tokens: int = 0  # no end-of-sequence token among the first so many
    # steps of the scheduled transfers, shared out over the blocks by their masks; null: one for each mask
    steps: int | None = used_with(None, transfer=tuple(SCHEDULED))
    # positions filled before the next block starts; null: those of a model that attends by blocks, else one block
    block_length: int | None = None
    # the score: origin (or random) | maskgit_plus (or low_confidence) | topk_margin | entropy | left_to_right
    alg: str = "entropy"
    alg_temp: float = 0.0  # 0 takes the most confident positions, above 0 samples them
    confidence: str = "unscaled"  # rate by the model's own distribution, or `scaled`: after temperature, top-p, top-k
    temperature: float = 0.0  # 0 takes the most likely token, above 0 samples it
    top_p: float | None = None  # nucleus: smallest set of tokens with at least this probability
    top_k: int | None = None  # the k most likely tokens
    # how many tokens a step commits: linear (Dream) | cosine | even (LLaDA), as scheduled | threshold | factor |
    # entropy_bound, as many as the model is sure of, whatever `steps` is
    transfer: str = "linear"
    eps: float = used_with(1e-3, transfer=("linear", "cosine"))  # time at which they end
    threshold: float = used_with(0.9, transfer=("threshold",))  # of transfer=threshold: the least probability
    factor: float = used_with(1.0, transfer=("factor",))  # of transfer=factor: bound on (n+1)·(1 - n-th probability)
    entropy_bound: float = used_with(0.1, transfer=("entropy_bound",))  # of transfer=entropy_bound: nats
    remask: float = 0.0  # a step masks at most this share of the committed tokens again (ReMDM)
    cfg_scale: float = 0.0  # classifier-free guidance; above 0 every step forwards twice
    eos_penalty: float = 0.0  # taken off the logits of end-of-sequence tokens
    eos_confidence: str = "keep"  # suppress: proposed end-of-sequence tokens are committed last in their block
    stop_at_eos: bool = True  # a row ends when nothing is masked before its end-of-sequence token
    # texts that end a row, as that token does; \n, \t, \r, \\ and \uXXXX stand for characters
    stop: list[str] = field(default_factory=list, metadata={"escapes": True})
    # tokens that are never committed, with the same escapes
    forbidden: list[str] = field(default_factory=list, metadata={"escapes": True})
    # keys and values kept: none | block, exact, of a model that attends by blocks | prefix | dual | delayed | auto:
    # block if the model attends by blocks, else none
    cache: str = "auto"
    # forwards between refreshes of all positions; null: only at a block's start
    cache_refresh: int | None = used_with(None, cache=("prefix", "dual", "delayed"))
    batch_size: int = 32  # prompts sampled together
    # CUDA graphs and compiled layers, see diffllm.static_forward: true | false | auto, which compiles long runs only
    compile: str = "auto"
    seed: int = 0  # a row's draws depend on (seed, row, step) alone

    def __post_init__(self) -> None:
        self.alg = LLADA_ALGS.get(self.alg, self.alg)
        self.compile = str(self.compile).lower()  # a bool in YAML and on the command line
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"sampling.{name}={getattr(self, name)}: choose one of {', '.join(allowed)}")
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not abs(value) <= LARGEST:  # nor NaN
                raise ValueError(f"sampling.{name}={value}: must be a number up to {LARGEST:.0e}")
        for name, allowed in RANGES.items():
            if (value := getattr(self, name)) is not None and not allowed.holds(value):
                raise ValueError(f"sampling.{name}={value}: must be {allowed.text}")
        if self.remask and self.adaptive:
            raise ValueError(
                f"sampling.remask={self.remask}: goes with a scheduled transfer ({', '.join(SCHEDULED)}), "
                f"not with sampling.transfer={self.transfer}"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"sampling.min_new_tokens={self.min_new_tokens}: more than "
                f"sampling.max_new_tokens={self.max_new_tokens}"
            )

    @property
    def adaptive(self) -> bool:
        """Whether confidence decides how many tokens a step commits, not a schedule."""
        return self.transfer in ADAPTIVE

    @property
    def bound(self) -> float:
        """The setting of an adaptive transfer."""
        return {"threshold": self.threshold, "factor": self.factor, "entropy_bound": self.entropy_bound}[self.transfer]

    @property
    def order_temp(self) -> float:
        """Temperature of the draw of positions; 0 takes the most confident ones."""
        return ORDER_TEMP.get(self.alg, self.alg_temp)

    @property
    def uses_entropy(self) -> bool:
        """Whether `alg` or `transfer` rates positions by entropy."""
        return not USE_ENTROPY.isdisjoint((self.alg, self.transfer))


def unescape(name: str, texts: list[str]) -> list[str]:
    r"""Make characters of \n, \t, \r, \\ and \uXXXX in the texts of setting `name`; other backslashes stay.

    Raises:
        ValueError: half of a surrogate pair.
    """

    def character(escape: re.Match) -> str:
        return ESCAPES[escape[1]] if escape[1] else chr(int(escape[2], 16))

    read = [re.sub(r"\\(?:([ntr\\])|u([0-9A-Fa-f]{4}))", character, text) for text in texts]
    try:
        return [text.encode("utf-16", "surrogatepass").decode("utf-16") for text in read]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}={texts}: half of a surrogate pair; write both, or the character") from error
