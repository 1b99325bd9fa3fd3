"""Settings of the reverse process."""

import re
from dataclasses import dataclass

from data.settings import check_fields, setting

ALGS = ("origin", "maskgit_plus", "topk_margin", "entropy", "left_to_right")
LLADA_ALGS = {"random": "origin", "low_confidence": "maskgit_plus"}
SCHEDULED = ("linear", "cosine", "even")
ADAPTIVE = ("threshold", "factor", "entropy_bound")
CACHES = ("none", "prefix", "dual", "delayed")
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


@dataclass
class SamplingConfig:
    """How a canvas is unmasked. What each policy does stands with its paper in the module that carries it out.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    max_new_tokens: int = setting(256, at_least=1)  # masked positions appended to the prompt
    min_new_tokens: int = setting(0, at_least=0)  # no end-of-sequence token among the first so many
    steps: int = setting(256, at_least=1)  # steps of the scheduled transfers, shared out over the blocks
    # positions filled before the next block starts; null is one block
    block_length: int | None = setting(None, at_least=1)
    # the score: origin (or random) | maskgit_plus (or low_confidence) | topk_margin | entropy | left_to_right
    alg: str = setting("entropy", choices=(*ALGS, *LLADA_ALGS))
    alg_temp: float = setting(0.0, at_least=0)  # 0 takes the most confident positions, above 0 samples them
    # rate by the model's own distribution, or `scaled`: after temperature, top-p, top-k
    confidence: str = setting("unscaled", choices=("unscaled", "scaled"))
    temperature: float = setting(0.0, at_least=0)  # 0 takes the most likely token, above 0 samples it
    # nucleus: smallest set of tokens with at least this probability
    top_p: float | None = setting(None, above=0, at_most=1)
    top_k: int | None = setting(None, at_least=1)  # the k most likely tokens
    # how many tokens a step commits: linear (Dream) | cosine | even (LLaDA), as scheduled | threshold | factor |
    # entropy_bound, as many as the model is sure of, whatever `steps` is
    transfer: str = setting("linear", choices=SCHEDULED + ADAPTIVE)
    eps: float = setting(1e-3, above=0, below=1)  # time at which linear and cosine end
    threshold: float = setting(0.9, above=0, at_most=1)  # of transfer=threshold: the least probability
    factor: float = setting(1.0, above=0)  # of transfer=factor: bound on (n+1)·(1 - n-th probability)
    entropy_bound: float = setting(0.1, above=0)  # of transfer=entropy_bound: nats
    # largest share of the committed tokens that a step masks again (ReMDM)
    remask: float = setting(0.0, at_least=0, below=1)
    cfg_scale: float = setting(0.0, at_least=0)  # classifier-free guidance; above 0 every step forwards twice
    eos_penalty: float = 0.0  # taken off the logits of end-of-sequence tokens
    stop_at_eos: bool = True  # a row ends when nothing is masked before its end-of-sequence token
    stop: list[str] = setting([], escapes=True)  # a row ends at the first of these strings likewise
    forbidden: list[str] = setting([], escapes=True)  # tokens that are never committed
    cache: str = setting("none", choices=CACHES)  # keys and values kept: none | prefix | dual | delayed
    # forwards until all keys and values are made anew; null does so where a block starts
    cache_refresh: int | None = setting(None, at_least=1)
    batch_size: int = setting(32, at_least=1)  # prompts sampled together
    seed: int = setting(0, at_least=0)  # a row's draws depend on (seed, row, step) alone

    def __post_init__(self) -> None:
        check_fields(self, "sampling")
        self.alg = LLADA_ALGS.get(self.alg, self.alg)
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
        """Whether the model's sureness decides how many tokens a step commits, not a schedule."""
        return self.transfer in ADAPTIVE


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
