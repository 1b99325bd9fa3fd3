"""Rows that leave and enter the batch against fixed batches: `python -m tests.benchmarks.continuous_batching`.

200 prompts of 8 to 256 tokens on canvases of 128 new ones, 16 at once; their responses end after 4 to 128 tokens. Both
lengths are log-uniform. A fixed batch is padded to its longest prompt and forwards all rows until the last one ends;
continuous batching puts the next prompt in the place of a row as soon as that has ended. The weights are random, and
an end-of-sequence token is forced where a response shall end. The tokens up to it are asserted to be the same. Prints
the medians of 5 runs, their ratio, and the forwards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from diffllm import DiffLLM, ModelConfig, new_model
from diffllm.tokenizer import builtin_tokenizer
from sampling import Canvas, RowState, SamplingConfig, Tokens, Visibility, fill, trim
from sampling.batch import RowBatch
from tests.benchmarks.measure import median_seconds

PROMPTS, LONGEST_PROMPT, NEW_TOKENS = 200, 256, 128
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "initializer_range": 0.1}
CONFIG = SamplingConfig(max_new_tokens=NEW_TOKENS, steps=32, transfer="even", block_length=16, batch_size=16)


class Ending:
    """A model that ends its rows where their first token says: it is the position of the end-of-sequence token."""

    def __init__(self, model: DiffLLM):
        self.model, self.device, self.vocab_size = model, model.device, model.vocab_size
        self.forwards = 0

    def hidden(self, x_t: Tensor, position_ids: Tensor, visibility: Visibility, row: Tensor, column: Tensor) -> Tensor:
        """[N, D + 1]: states, and whether a position is at the end or behind it."""
        self.forwards += 1
        states = self.model.hidden(x_t, position_ids, visibility, row, column)
        attended = visibility.attended
        first = torch.zeros_like(row) if attended is None else (~attended).sum(-1)[row]
        over = column - first >= x_t[row, first]
        return torch.cat([states, over[:, None]], dim=-1)

    def head(self, hidden: Tensor) -> Tensor:
        logits = self.model.head(hidden[:, :-1])
        logits[:, self.model.eos_token_id] += 1e4 * hidden[:, -1]
        return logits


def make_canvases(mask: int) -> list[Canvas]:
    rng = np.random.default_rng(0)
    prompts = np.exp(rng.uniform(np.log(8), np.log(LONGEST_PROMPT), PROMPTS)).astype(int)
    responses = np.exp(rng.uniform(np.log(4), np.log(NEW_TOKENS), PROMPTS)).astype(int)
    return [
        Canvas.after([prompt + response - 1, *rng.integers(10, 1000, prompt - 1).tolist()], NEW_TOKENS, mask, name)
        for name, (prompt, response) in enumerate(zip(prompts.tolist(), responses.tolist(), strict=True))
    ]


def continuous(model: Ending, canvases: Sequence[Canvas], special: Tokens) -> Iterator[list[int]]:
    """Responses before their end, in the order of the canvases."""
    rows = sorted(fill(model, canvases, CONFIG, special), key=lambda row: row.canvas.row_id)
    return (trim(row.tokens[row.canvas.prompt_length :], special.eos) for row in rows)


def fixed(model: Ending, canvases: Sequence[Canvas], special: Tokens) -> Iterator[list[int]]:
    """The same, in batches that stay together until all their rows have ended."""
    config = replace(CONFIG, stop_at_eos=False)
    for start in range(0, len(canvases), config.batch_size):
        rows = [RowState(canvas, config, special) for canvas in canvases[start : start + config.batch_size]]
        batch = RowBatch(model, config, special)
        batch.set_rows(rows)
        while not all(special.mask not in response_of(row) for row in rows):
            for row, proposal in zip(rows, batch.propose(), strict=True):
                row.commit(*proposal)
                row.advance()
        yield from map(response_of, rows)


def response_of(row: RowState) -> list[int]:
    return trim(row.tokens[row.canvas.prompt_length :].tolist(), row.special.eos)


@torch.no_grad()
def main() -> None:
    model = Ending(new_model(ModelConfig(**SHAPE), builtin_tokenizer()).eval())
    special = model.model.special_tokens
    canvases = make_canvases(special.mask)
    responses, forwards = [], []
    for variant in (continuous, fixed):
        model.forwards = 0
        responses.append(list(variant(model, canvases, special)))
        forwards.append(model.forwards)
    assert responses[0] == responses[1]
    tokens = sum(len(response) + 1 for response in responses[0])
    seconds = median_seconds(
        lambda: list(continuous(model, canvases, special)), lambda: list(fixed(model, canvases, special))
    )
    print(
        f"{PROMPTS} prompts, {tokens:,} tokens up to the end: continuous {tokens / seconds[0]:,.0f} tokens/s in "
        f"{forwards[0]} forwards of the batch, fixed {tokens / seconds[1]:,.0f} tokens/s in {forwards[1]}, "
        f"{seconds[1] / seconds[0]:.2f} times faster, same tokens"
    )


if __name__ == "__main__":
    main()
