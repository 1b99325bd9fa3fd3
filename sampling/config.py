"""Settings of the reverse process."""

from dataclasses import dataclass

ALGS = ("origin", "maskgit_plus", "topk_margin", "entropy")
TRANSFERS = ("time_grid", "even")
CONFIDENCES = ("unscaled", "scaled")


@dataclass
class SamplingConfig:
    """How a canvas is unmasked.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    max_new_tokens: int = 256  # masked positions appended to the prompt
    steps: int = 256  # steps of the reverse process, shared out over the blocks
    block_length: int | None = None  # positions filled before the next block starts; null is one block
    alg: str = "entropy"  # what ranks the positions: origin | maskgit_plus | topk_margin | entropy
    alg_temp: float = 0.0  # 0 takes the most confident positions, above 0 samples them
    temperature: float = 0.0  # 0 takes the most likely token, above 0 samples it
    top_p: float | None = None  # nucleus: smallest set of tokens with at least this probability
    top_k: int | None = None  # the k most likely tokens
    transfer: str = "time_grid"  # how many tokens a step commits: time_grid (Dream) | even (LLaDA)
    eps: float = 1e-3  # time at which time_grid ends
    confidence: str = "unscaled"  # rank by the model's own distribution, or `scaled`: after temperature, top-p, top-k
    batch_size: int = 32  # prompts sampled together
    seed: int = 0  # a row's draws depend on (seed, row, step) alone

    def __post_init__(self) -> None:
        for field, allowed in (("alg", ALGS), ("transfer", TRANSFERS), ("confidence", CONFIDENCES)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"sampling.{field}={getattr(self, field)}: choose one of {', '.join(allowed)}")
        for field in ("max_new_tokens", "steps", "block_length", "top_k", "batch_size"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"sampling.{field}={value}: must be at least 1")
        for field in ("temperature", "alg_temp", "seed"):
            if getattr(self, field) < 0:
                raise ValueError(f"sampling.{field}={getattr(self, field)}: must not be negative")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p}: must be in (0, 1]")
        if not 0 < self.eps < 1:
            raise ValueError(f"sampling.eps={self.eps}: must be in (0, 1)")
