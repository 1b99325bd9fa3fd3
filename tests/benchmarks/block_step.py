"""A step by blocks against one by masks: `python -m tests.benchmarks.block_step [LENGTH …]`.

Same model, same rows, half of the tokens masked; blocks of 32 with x_0 and one noised copy side by side. Prints for
each length of a row the medians of 5 steps and the bytes kept for the backward pass, and their ratios to the step by
masks: by blocks in parts, in parts where a quarter of the row is prompt, and with a dense mask.
"""

import sys
from functools import partial

import torch

from data import Batch
from diffllm import DiffLLM, ModelConfig, new_model
from diffllm.diffusion import Objective
from diffllm.diffusion.block import BlockConfig, BlockDiffusion
from diffllm.diffusion.masked import DiffusionConfig, MaskedDiffusion
from diffllm.tokenizer import builtin_tokenizer
from tests.benchmarks.measure import median_seconds
from tests.benchmarks.models import DEVICE, DTYPE

SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
HEADS_OF_KEYS = 2
TOKENS = 4096
LENGTHS = (128, 512, 2048)
SETTINGS = {"t_sampler": "stratified", "loss_norm": "masked"}


def make_batch(length: int, prompt: int = 0) -> Batch:
    rows = TOKENS // length
    return {
        "input_ids": torch.randint(10, 1000, (rows, length)),
        "maskable": (torch.arange(length) >= prompt).expand(rows, -1),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "position_ids": torch.arange(length).expand(rows, -1),
        "sample_index": torch.arange(rows),
        "slot": torch.arange(rows),
        "batch_size": torch.full((rows,), rows),
    }


def step(model: DiffLLM, objective: Objective, batch: Batch) -> None:
    (objective.loss(model, batch).loss / objective.denominator(batch)).backward()


def activations(model: DiffLLM, objective: Objective, batch: Batch) -> int:
    """Bytes that a forward keeps for the backward pass, without weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective.loss(model, batch)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


def main() -> None:
    for length in map(int, sys.argv[1:] or LENGTHS):
        shape = ModelConfig(**SHAPE, num_key_value_heads=HEADS_OF_KEYS, attn_implementation="varlen")
        parts = new_model(shape, builtin_tokenizer()).train().to(DEVICE, DTYPE)
        shape.attn_implementation = "sdpa"
        dense = new_model(shape, builtin_tokenizer()).train().to(DEVICE, DTYPE)
        masks = MaskedDiffusion(DiffusionConfig(**SETTINGS), parts.mask_token_id, 0)
        blocks = BlockDiffusion(BlockConfig(**SETTINGS), parts.mask_token_id, 0)
        batch, prompted = make_batch(length), make_batch(length, length // 4)
        variants = {
            "by masks": (dense, masks, masks.corrupt(batch, 0)),
            "by blocks": (parts, blocks, blocks.corrupt(batch, 0)),
            "by blocks after a prompt": (parts, blocks, blocks.corrupt(prompted, 0)),
            "by blocks, dense mask": (dense, blocks, blocks.corrupt(batch, 0)),
        }
        seconds = median_seconds(*(partial(step, *variant) for variant in variants.values()))
        memory = [activations(*variant) for variant in variants.values()]
        for name, taken, kept in zip(variants, seconds, memory, strict=True):
            print(
                f"rows of {length:,} tokens, {name}: {taken:.2f} s, {taken / seconds[0]:.2f} times; "
                f"{kept / 2**20:,.0f} MiB kept, {kept / memory[0]:.2f} times",
                flush=True,
            )


if __name__ == "__main__":
    main()
