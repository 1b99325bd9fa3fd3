"""Settings of the data road."""

from dataclasses import dataclass, field

TRUNCATIONS = ("error", "right", "drop")
CUTOFFS = ("min_pad", "random", "random_with_input_pad")


@dataclass
class DataConfig:
    """Which rows are trained on, and how they become batches.

    Of `train_batch_size` = `micro_batch_size_per_gpu` × `gradient_accumulation_steps` × ranks, whatever is null is
    derived.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    train_files: list[str] = field(default_factory=list)  # .jsonl or .parquet; empty trains on generated equations
    val_files: list[str] = field(default_factory=list)  # likewise; empty with train_files given: no validation
    max_length: int = 2048  # tokens of prompt and response
    truncation: str = "error"  # of a longer row: error | right cuts the response | drop
    train_batch_size: int | None = None  # rows of one optimizer step over all ranks
    micro_batch_size_per_gpu: int | None = None  # rows of one forward
    gradient_accumulation_steps: int | None = None  # forwards of one optimizer step
    enable_perbatch_cutoff: bool = True  # shorten each global batch; false pads every row to max_length
    perbatch_cutoff_type: str = "random_with_input_pad"  # min_pad | random | random_with_input_pad
    group_by_length: bool = False  # rows of like length share a batch: less padding, a less random order
    resp_cutoff_ratio: float = 0.0  # share of the batches that lose a random tail
    num_workers: int = 1  # loader processes of each rank

    def __post_init__(self) -> None:
        for name, allowed in (("truncation", TRUNCATIONS), ("perbatch_cutoff_type", CUTOFFS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"data.{name}={getattr(self, name)}: choose one of {', '.join(allowed)}")
        for name in ("max_length", "train_batch_size", "micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name}={value}: must be at least 1")
        if not 0 <= self.resp_cutoff_ratio <= 1:
            raise ValueError(f"data.resp_cutoff_ratio={self.resp_cutoff_ratio}: must be in [0, 1]")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers={self.num_workers}: must not be negative")
