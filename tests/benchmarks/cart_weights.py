"""CART weights as two scans against the published L×L matrix: `python -m tests.benchmarks.cart_weights`.

Prints the medians of 5 runs, their ratio, and the largest difference.
"""

import math

import torch
from torch import Tensor

from diffllm.diffusion.weights import cart_weights
from tests.benchmarks.measure import median_seconds

P = 0.1
BATCH = 4
LENGTHS = (512, 2048, 8192)


def by_matrix(context: Tensor, p: float) -> Tensor:
    """Every pair of positions at once, the distance's geometric probability computed through logarithms."""
    positions = torch.arange(context.shape[1], device=context.device)
    distance = (positions[:, None] - positions).abs()
    kernel = (math.log(p) + (distance - 1) * math.log(1 - p)).exp() / 2
    return context.float() @ kernel.masked_fill(distance == 0, 0.0)


def main() -> None:
    torch.manual_seed(0)
    for length in LENGTHS:
        context = torch.rand(BATCH, length) < 0.5
        scans, matrix = median_seconds(lambda: cart_weights(context, P), lambda: by_matrix(context, P))  # noqa: B023
        error = (cart_weights(context, P) - by_matrix(context, P)).abs().max()
        print(
            f"L = {length}, batch {BATCH}: scans {scans * 1e3:.2f} ms, matrix {matrix * 1e3:.2f} ms, "
            f"{matrix / scans:.0f} times faster, difference {error:.1e}"
        )


if __name__ == "__main__":
    main()
