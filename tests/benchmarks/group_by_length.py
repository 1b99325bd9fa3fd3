"""Padding with and without `data.group_by_length`: `python -m tests.benchmarks.group_by_length`.

1,000 rows whose lengths spread as those of worked answers do (log-normal, median 300 response tokens), batches of 32 in
micro-batches of 8. Prints the share of positions that are padding, and of the row's own tokens that were cut off.
"""

import numpy as np

from data import BatchLayout, DataConfig, TokenRows, TrainBatches
from data.config import CUTOFFS

EOS = 0


def make_rows(rows: int = 1000) -> TokenRows:
    rng = np.random.default_rng(0)
    prompts = rng.lognormal(np.log(80), 0.5, rows).astype(int).clip(8, 500)
    responses = rng.lognormal(np.log(300), 0.7, rows).astype(int).clip(8, 1500)
    ids = [np.append(np.ones(length - 1, dtype=np.int32), np.int32(EOS)) for length in prompts + responses]
    return TokenRows.of(ids, prompts)


def shares(rows: TokenRows, config: DataConfig) -> tuple[float, float]:
    """Of one epoch: padding among the positions, and tokens that were cut off."""
    train = TrainBatches(rows, config, BatchLayout(0, 1, 8, 4), EOS, lambda batch, *_: batch, seed=0)
    batches = [batch for step in range(train.steps_per_epoch) for batch in train[step]]
    positions = sum(batch["input_ids"].numel() for batch in batches)
    kept = sum(int(batch["row_tokens"].sum()) for batch in batches)
    whole = sum(int(rows.lengths[batch["sample_index"].numpy()].sum()) for batch in batches)
    return 1 - kept / positions, 1 - kept / whole


def main() -> None:
    rows = make_rows()
    for cutoff in CUTOFFS:
        for grouped in (False, True):
            config = DataConfig(max_length=2048, perbatch_cutoff_type=cutoff, group_by_length=grouped)
            padding, cut = shares(rows, config)
            print(f"{cutoff}, group_by_length={grouped}: {padding:.1%} of the positions are padding, {cut:.1%} cut off")


if __name__ == "__main__":
    main()
