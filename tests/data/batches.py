"""Rows and batches for tests."""

import numpy as np
import torch

from data import BatchLayout, DataConfig, TokenRows, TrainBatches
from data.token_rows import SCHEMA

EOS = 0


def make_rows(prompts, responses, end=EOS):
    """Row i holds 100·i + 1, 100·i + 2, … and the end of sequence."""
    lengths = zip(prompts, responses, strict=True)
    ids = [np.arange(1, p + r + 1, dtype=np.int32) + 100 * i for i, (p, r) in enumerate(lengths)]
    for row in ids:
        row[-1] = end
    return TokenRows.of(ids, prompts, cut=end != EOS)


PLACE = {name: place for place, name in enumerate(SCHEMA.names)}
ROWS = make_rows([3, 5, 2, 4, 6, 3, 2, 5, 4, 3], [4, 2, 6, 3, 5, 1, 8, 2, 7, 4])


def no_noise(batch, epoch):
    return {**batch, "epoch": torch.tensor(epoch)}


def batches(ranks=1, micro=4, accumulation=1, rows=ROWS, **settings):
    config = DataConfig(num_workers=0, max_length=16, **settings)
    return [
        TrainBatches(rows, config, BatchLayout(rank, ranks, micro, accumulation), EOS, no_noise, seed=7)
        for rank in range(ranks)
    ]


def by_slot(step, layout):
    """slot → (sample, its attended tokens, its maskable tokens)"""
    rows = {}
    for rank_batches in layout:
        for batch in rank_batches[step]:
            for i, slot in enumerate(batch["slot"].tolist()):
                attended = batch["attention_mask"][i].bool()
                ids, maskable = batch["input_ids"][i], batch["maskable"][i]
                rows[slot] = (int(batch["sample_index"][i]), ids[attended].tolist(), ids[maskable].tolist())
    return rows
