"""Forward and backward pass against the published procedure: `python -m tests.benchmarks.training_step [SHAPE …]`.

The published procedure makes the logits of all positions in float32, shifts them, takes the cross entropy of every
position, and weights it through the L×L CART matrix. Ours projects the masked positions only, and makes the gradient
in the same pass. Same weights, same batch. Prints for each shape the medians of 5 runs, their ratio, the peak of memory
above weights and gradients, and the losses.
"""

import math
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from diffllm import DiffLLM, ModelConfig, new_model
from diffllm.diffusion.weights import time_weights
from diffllm.tokenizer import builtin_tokenizer
from tests.benchmarks.cart_weights import by_matrix
from tests.benchmarks.measure import median_seconds, peak_bytes

QWEN_VOCABULARY = 151_936
P = 0.1
# name: (model, rows, tokens a row)
SHAPES = {
    "toy": ({"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}, 4, 256),
    "small": ({"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}, 4, 256),
    "0.5b": (
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        4,
        64,
    ),
}
PROMPT_SHARE = 3 / 8  # of a row's tokens; the rest may be masked


def make_batch(model: DiffLLM, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, x_0, masked [B, L] and t [B] at t = 0.5, of rows that begin with a prompt."""
    x_0 = torch.randint(1000, (rows, length))
    response = torch.arange(length) >= PROMPT_SHARE * length
    masked = response & (torch.rand(rows, length) < 0.5)
    return x_0.masked_fill(masked, model.mask_token_id), x_0, masked, torch.full((rows,), 0.5)


def ours(model: DiffLLM, x_t: Tensor, x_0: Tensor, masked: Tensor, t: Tensor) -> float:
    weights = time_weights(t[:, None], masked, torch.ones_like(masked), "cart", P)
    loss = model(x_t, x_0, masked, weights).loss / masked.sum()
    loss.backward()
    return loss.item()


def published(model: DiffLLM, x_t: Tensor, x_0: Tensor, masked: Tensor, t: Tensor) -> float:
    logits = model.logits(x_t).float()
    shifted = torch.cat([logits[:, :1], logits[:, :-1]], dim=1).contiguous()
    nll = F.cross_entropy(shifted.view(-1, shifted.shape[-1]), x_0.view(-1), reduction="none").view_as(x_0)
    nll = nll.masked_fill(~masked, 0)
    loss = (by_matrix(~masked, P) * nll).sum() / masked.sum()
    loss.backward()
    return loss.item()


def main() -> None:
    for name in sys.argv[1:] or SHAPES:
        shape, rows, length = SHAPES[name]
        torch.manual_seed(0)
        model = new_model(ModelConfig(vocab_size=QWEN_VOCABULARY, **shape), builtin_tokenizer()).train()
        batch = make_batch(model, rows, length)

        def step(variant, model=model, batch=batch, keep_gradients=False) -> float:
            model.zero_grad(set_to_none=not keep_gradients)
            return variant(model, *batch)

        losses = step(ours), step(published)
        assert math.isclose(*losses, rel_tol=1e-5), losses
        memory = [peak_bytes(partial(step, variant, keep_gradients=True)) / 2**20 for variant in (ours, published)]
        seconds = median_seconds(partial(step, ours), partial(step, published))
        print(
            f"{name}: hidden {shape['hidden_size']}, {shape['num_hidden_layers']} layers, vocabulary "
            f"{QWEN_VOCABULARY:,}, {rows}×{length} tokens, {batch[2].sum()} masked: "
            f"{seconds[0]:.2f} s, published {seconds[1]:.2f} s, {seconds[1] / seconds[0]:.2f} times faster; "
            f"memory above weights and gradients {memory[0]:,.0f} MiB, published {memory[1]:,.0f} MiB, "
            f"{memory[0] / memory[1]:.0%}; loss {losses[0]:.6f} and {losses[1]:.6f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
