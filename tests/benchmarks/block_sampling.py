"""Generation by blocks, by masks and from left to right: `python -m tests.benchmarks.block_sampling [ROWS …]`.

Same random weights, same prompts, no end: 256 tokens, by 1 and by 4 a forward. Prints for each number of rows the
tokens a second of the median of 5 runs, and their ratio to masks whose forwards compute the whole canvas.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM

from diffllm import DiffLLM, ModelConfig, new_model
from diffllm.tokenizer import builtin_tokenizer
from sampling import SamplingConfig, sample
from tests.benchmarks.measure import median_seconds
from tests.benchmarks.models import DEVICE, DTYPE

SHAPE = ModelConfig(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=32_000,
)
PROMPT, NEW = 64, 256  # tokens
ROWS = (1, 8)
BLOCKS = (4, 8, 16, 32)


def fill(model: DiffLLM, prompts: torch.Tensor, config: SamplingConfig, block_length: int | None = None) -> None:
    """Sample a response to each prompt.

    Args:
        block_length: of the model's attention.
    """
    model.block_length = block_length
    sample(model, prompts, config, model.special_tokens)


def ways(model: DiffLLM, prompts: torch.Tensor, at_once: int) -> dict[str, Callable[[], None]]:
    """Ways to sample, by name.

    Args:
        at_once: tokens that a forward commits.
    """
    config = SamplingConfig(max_new_tokens=NEW, steps=NEW // at_once, transfer="even", stop_at_eos=False)
    dual = replace(config, cache="dual", block_length=32)
    return {
        "masks": partial(fill, model, prompts, config),
        "masks, cache dual, blocks of 32": partial(fill, model, prompts, dual),
        **{f"attention by blocks of {n}": partial(fill, model, prompts, config, n) for n in BLOCKS},
    }


def main() -> None:
    model = new_model(SHAPE, builtin_tokenizer()).to(DEVICE, DTYPE).eval()
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory, causal=True)
        causal = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPE).to(DEVICE)
    for rows in map(int, sys.argv[1:] or ROWS):
        prompts = torch.randint(10, 1000, (rows, PROMPT), device=DEVICE)
        greedy = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW}
        left_to_right = partial(causal.generate, prompts, attention_mask=torch.ones_like(prompts), **greedy)
        for at_once in (1, 4):
            variants = ways(model, prompts, at_once)
            if at_once == 1:
                variants["left to right, by Transformers"] = left_to_right
            seconds = median_seconds(*variants.values())
            for name, taken in zip(variants, seconds, strict=True):
                print(
                    f"{rows} rows, {at_once} tokens a forward, {name}: {rows * NEW / taken:,.0f} tokens/s, "
                    f"{seconds[0] / taken:.2f} times",
                    flush=True,
                )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
