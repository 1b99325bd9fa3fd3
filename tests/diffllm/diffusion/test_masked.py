"""Masked diffusion: noise that is keyed, layout-free, and distributed as it should be; denominators."""

import math

import numpy as np
import pytest
import torch

from diffllm import DiffusionConfig, MaskedDiffusion
from diffllm.diffusion.masked import LOSS_NORMS, T_SAMPLERS

MASK = 99


def batch(samples, size, width=16, left_pad=0):
    n = len(samples)
    columns = torch.arange(left_pad + width)
    return {
        "input_ids": torch.arange(left_pad + width).expand(n, -1) % 90,
        "maskable": (columns >= left_pad + 4).expand(n, -1),
        "attention_mask": (columns >= left_pad).long().expand(n, -1),
        "sample_index": torch.tensor(samples),
        "slot": torch.tensor(samples),
        "batch_size": torch.full((n,), size),
    }


@pytest.mark.parametrize("t_sampler", T_SAMPLERS)
def test_noise_is_a_function_of_the_sample(t_sampler):
    """Neither company, order nor left padding changes it; seed and epoch do."""
    process = MaskedDiffusion(DiffusionConfig(t_sampler=t_sampler), MASK, seed=5)
    together = process.corrupt(batch([0, 1, 2, 3], 4), 2)
    alone = process.corrupt(batch([2], 4, left_pad=3), 2)
    assert torch.equal(together["masked"][2], alone["masked"][0, 3:])
    assert torch.equal(together["t"][2], alone["t"][0, 3:])
    for other in (
        MaskedDiffusion(process.config, MASK, 6).corrupt(batch([2], 4), 2),
        process.corrupt(batch([2], 4), 3),
    ):
        assert not torch.equal(other["masked"][0], together["masked"][2])


def test_only_maskable_positions_are_noised():
    noised = MaskedDiffusion(DiffusionConfig(), MASK, 0).corrupt(batch(list(range(50)), 50), 0)
    assert not noised["masked"][:, :4].any()
    assert torch.equal(noised["x_t"] == MASK, noised["masked"])
    assert torch.equal(noised["x_t"][~noised["masked"]], noised["input_ids"][~noised["masked"]])
    assert (noised["weights"] > 0).equal(noised["masked"])


def test_stratified_times_cover_the_global_batch():
    """One t in each of B equally likely parts, whichever micro-batch a row is in."""
    for t_sampler, share in (
        ("stratified", lambda t: (t - 0.01) / 0.99),
        ("importance", lambda t: (t**0.5 - 0.1) / 0.9),
        ("cosine", lambda t: 2 / math.pi * torch.asin((t - 0.01) / 0.99)),
    ):
        process = MaskedDiffusion(DiffusionConfig(eps=0.01, t_sampler=t_sampler), MASK, 0)
        halves = [process.corrupt(batch(samples, 8), 0)["t"][:, 0] for samples in ([0, 1, 2, 3], [4, 5, 6, 7])]
        assert ((share(torch.cat(halves)) * 8).long() == torch.arange(8)).all()


@pytest.mark.parametrize("t_sampler", ["importance", "stratified", "cosine"])
def test_importance_corrects_the_density(t_sampler):
    """Weighted means over a fine grid of draws are those under U(eps, 1)."""
    process = MaskedDiffusion(DiffusionConfig(eps=1e-2, t_sampler=t_sampler), MASK, 0)
    t = torch.tensor([process.time((slot + 0.5) / 10_000) for slot in range(10_000)], dtype=torch.float64)
    importance = process.importance(t)
    assert importance.mean().item() == pytest.approx(1, rel=1e-5)
    assert (importance * t).mean().item() == pytest.approx(0.505, rel=1e-5)
    assert (importance / t).mean().item() == pytest.approx(math.log(100) / 0.99, rel=1e-5)


def test_cosine_times_are_not_weighted_back():
    """Draws follow MaskGIT's schedule, cos(π/2·r) of uniform r; the loss is the plain mean over the masked tokens."""
    config = DiffusionConfig(t_sampler="cosine", time_reweighting="none", loss_norm="masked", eps=1e-9)
    objective = MaskedDiffusion(config, MASK, 0)
    noised = objective.corrupt(batch(list(range(1000)), 1000), 0)
    r = (torch.arange(1000) + 0.5) / 1000
    assert noised["t"][:, 0].flip(0).numpy() == pytest.approx(torch.cos(math.pi / 2 * r).numpy(), abs=2e-3)
    assert torch.equal(noised["weights"], noised["masked"].float())
    assert objective.denominator(noised) == noised["masked"].sum()


@pytest.mark.parametrize("loss_norm", LOSS_NORMS)
def test_denominators_of_micro_batches_add_up(loss_norm):
    objective = MaskedDiffusion(DiffusionConfig(loss_norm=loss_norm), MASK, 0)
    noised = objective.corrupt(batch(list(range(8)), 8), 0)
    parts = [{name: rows[half] for name, rows in noised.items()} for half in (slice(0, 3), slice(3, 8))]
    expected = {
        "masked": (noised["masked"] * noised["importance"]).sum().item(),
        "maskable": 8 * 12,
        "sequence": 8,
    }
    assert sum(objective.denominator(part).item() for part in parts) == pytest.approx(expected[loss_norm])


def test_the_share_of_masked_tokens_is_t():
    """Over 400 rows of 500 tokens the count lies within 5 standard errors of Σ t: a false alarm once in 1.7 million."""
    objective = MaskedDiffusion(DiffusionConfig(t_sampler="uniform"), MASK, 0)
    noised = objective.corrupt(batch(list(range(400)), 400, width=504), 0)
    t = noised["t"][:, 0].double()
    error = noised["masked"].sum().item() - 500 * t.sum().item()
    assert abs(error) < 5 * math.sqrt(500 * (t * (1 - t)).sum().item())
    assert abs(t.mean().item() - 0.5) < 5 / math.sqrt(12 * 400)


@pytest.mark.parametrize(
    "t_sampler", [T_SAMPLERS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in T_SAMPLERS[1:])]
)
def test_the_elbo_estimator_has_the_exact_mean(t_sampler):
    """Against enumeration on three tokens, each one of three symbols.

    The bound is ∫ dt Σ_M t^|M|·(1-t)^(3-|M|)·(1/t)·Σ_{i in M} nll_i(x_M) over the subsets M of masked positions. The
    mean of 40,000 draws lies within 5 standard errors: a false alarm once in 1.7 million.
    """
    rng = np.random.default_rng(0)
    length, n = 3, 40_000
    x_0 = torch.tensor([0, 2, 1])
    probs = rng.dirichlet(np.ones(3), size=(4,) * length + (length,))  # p(x_i | x_t), 3 stands for the mask
    nll = lambda x_t: -np.log(probs[tuple(x_t.tolist())][np.arange(length), x_0])  # noqa: E731

    eps = 1e-3
    nodes, node_weights = np.polynomial.legendre.leggauss(8)
    t, dt = eps + (1 - eps) * (nodes + 1) / 2, node_weights / 2  # the draws are uniform on [eps, 1]
    exact = 0.0
    for bits in range(1, 2**length):
        masked = torch.tensor([bool(bits >> i & 1) for i in range(length)])
        m = int(masked.sum())
        likelihood = (dt * t ** (m - 1) * (1 - t) ** (length - m)).sum()
        exact += likelihood * nll(torch.where(masked, 3, x_0))[masked].sum()

    rows = {
        "input_ids": x_0.expand(n, -1),
        "maskable": torch.ones(n, length, dtype=torch.bool),
        "attention_mask": torch.ones(n, length),
        "sample_index": torch.arange(n),
        "slot": torch.arange(n),
        "batch_size": torch.full((n,), n),
    }
    noised = MaskedDiffusion(DiffusionConfig(eps=eps, t_sampler=t_sampler), 3, 0).corrupt(rows, 0)
    weights = (noised["masked"] * noised["importance"] / noised["t"]).numpy()
    assert t_sampler == "cosine" or torch.equal(noised["weights"] > 0, noised["masked"])
    draws = np.array([(w * nll(x)).sum() for w, x in zip(weights, noised["x_t"], strict=True)])
    assert abs(draws.mean() - exact) < 5 * draws.std() / math.sqrt(n)
