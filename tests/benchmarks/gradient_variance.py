"""Variance of the gradient by the way t is drawn: `python -m tests.benchmarks.gradient_variance [DRAWS]`.

Every draw is an optimizer step's rows with their noise while the parameters stay the same; the variance is that of the
whole gradient, E|g - E g|², at the same number of forward tokens. Printed against independent uniform t, for a model
from scratch and after some training, with 95 % intervals from 2,000 bootstrap samples of the draws. Stratified t takes
away what differs between the times of a batch, importance sampling the weight of few tokens at small t; what differs
between rows stays.

Complementary masks forward half as many rows twice, at t with some tokens masked and at 1 - t with all the others.
"""

import sys

import numpy as np
import torch
from torch import Tensor

from data import BatchLayout, DataConfig, TokenRows, TrainBatches, rows_of
from data.batches import Batch
from data.tasks.equations import Equations
from diffllm import DiffLLM, DiffusionConfig, MaskedDiffusion, ModelConfig, new_model
from diffllm.diffusion.weights import time_weights
from diffllm.tokenizer import builtin_tokenizer

ROWS = 8
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def long_rows(equations: TokenRows, rows: int = 400, joined: int = 6) -> TokenRows:
    """Rows of several equations each: about 180 response tokens."""
    rng = np.random.default_rng(0)
    chosen = [rng.choice(len(equations), joined, replace=False) for _ in range(rows)]
    ids = [np.concatenate([equations.ids(i) for i in row]) for row in chosen]
    prompts = np.array([equations.prompt_lengths[row[0]] for row in chosen])
    return TokenRows.of(ids, prompts)


def complement(batch: Batch, config: DiffusionConfig, mask_token_id: int) -> Batch:
    """The rows of a noised batch with the other tokens masked, at 1 - t."""
    t = (1 - batch["t"]).clamp(min=config.eps)
    masked = batch["maskable"] & ~batch["masked"]
    attended = batch["attention_mask"].bool()
    weights = time_weights(t, masked, attended, config.time_reweighting, config.cart_p)
    x_t = batch["input_ids"].masked_fill(masked, mask_token_id)
    return {**batch, "t": t, "masked": masked, "weights": weights, "x_t": x_t}


def gradient(model: DiffLLM, batch: Batch, objective: MaskedDiffusion) -> Tensor:
    model.zero_grad()
    (objective.loss(model, batch).loss / objective.denominator(batch)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def draw_gradients(model: DiffLLM, config: DiffusionConfig, rows: TokenRows, draws: int, twice: bool = False) -> Tensor:
    """[draws, parameters] gradients of as many steps."""
    layout = BatchLayout(rank=0, ranks=1, micro_batch_size=ROWS // 2 if twice else ROWS, micro_batches=1)
    objective = MaskedDiffusion(config, model.mask_token_id, seed=1)
    data = DataConfig(perbatch_cutoff_type="min_pad")
    batches = TrainBatches(rows, data, layout, model.eos_token_id, objective.corrupt, seed=1)
    gradients = []
    for step in range(draws):
        [batch] = batches[step]
        halves = [batch, complement(batch, config, model.mask_token_id)] if twice else [batch]
        gradients.append(sum(gradient(model, half, objective) for half in halves) / len(halves))
    return torch.stack(gradients)


def train(model: DiffLLM, rows: TokenRows, steps: int) -> None:
    layout = BatchLayout(rank=0, ranks=1, micro_batch_size=ROWS, micro_batches=1)
    objective = MaskedDiffusion(DiffusionConfig(), model.mask_token_id, seed=0)
    batches = TrainBatches(rows, DataConfig(), layout, model.eos_token_id, objective.corrupt, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        gradient(model, batches[step][0], objective)
        optimizer.step()


def deviations(gradients: Tensor) -> np.ndarray:
    """[draws] |g - mean|²·n / (n - 1), whose mean is the variance."""
    n = len(gradients)
    return ((gradients - gradients.mean(0)).square().sum(1) * n / (n - 1)).double().numpy()


def ratio_interval(ours: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Ratio of two variances and its 95 % interval."""
    rng = np.random.default_rng(0)
    samples = [rng.choice(ours, len(ours)).mean() / rng.choice(reference, len(reference)).mean() for _ in range(2000)]
    return ours.mean() / reference.mean(), *np.percentile(samples, [2.5, 97.5])


def main() -> None:
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    tokenizer = builtin_tokenizer()
    rows = long_rows(rows_of({"equations": Equations().rows("train")}, DataConfig(max_length=64), tokenizer)[0])
    for steps in (0, 100):
        model = new_model(ModelConfig(**SHAPE, num_key_value_heads=2), tokenizer)
        train(model, rows, steps)
        for weighting, loss_norm in (("original", "maskable"), ("cart", "masked"), ("none", "masked")):
            settings = {"time_reweighting": weighting, "loss_norm": loss_norm}
            default = DiffusionConfig(**settings)
            stratified = DiffusionConfig(t_sampler="stratified", **settings)
            uniform = deviations(draw_gradients(model, DiffusionConfig(t_sampler="uniform", **settings), rows, draws))
            for name, config, twice in (
                ("t as by default", default, False),
                ("stratified t", stratified, False),
                ("stratified t and complementary masks", stratified, True),
            ):
                found = deviations(draw_gradients(model, config, rows, draws, twice))
                ratio, low, high = ratio_interval(found, uniform)
                print(
                    f"after {steps} steps, {weighting} weights over {loss_norm} tokens, {draws} draws of {ROWS} rows "
                    f"forwarded: with {name} the variance is {ratio:.0%} of that with uniform t "
                    f"(95 % interval {low:.0%} to {high:.0%})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
