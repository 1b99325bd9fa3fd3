"""Groups of parameters, the learning rate, moments in 8 bits, and Muon."""

import copy
import importlib.util
import shutil
import sys

import pytest
import torch

from tests.trainer.runs import losses, train
from trainer.build import build_optimizer, muon_matrices, set_lr
from trainer.config import OptimConfig
from trainer.muon import orthogonalise


def test_norms_and_biases_do_not_decay(small_model):
    decayed, others = build_optimizer(small_model, OptimConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(small_model.parameters()))


def test_frozen_parameters_are_left_out(small_model):
    small_model.requires_grad_(False)
    small_model.lm.lm_head.requires_grad_(True)
    [group] = build_optimizer(small_model, OptimConfig()).param_groups
    assert group["params"] == [small_model.lm.lm_head.weight]


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("cosine", [0.0, 0.25, 0.5, 0.4665063509461097, 0.125]),
        ("linear", [0.0, 0.25, 0.5, 0.4166666666666667, 0.16666666666666666]),
        ("constant", [0.0, 0.25, 0.5, 0.5, 0.5]),
        ("wsd", [0.0, 0.25, 0.5, 0.5, 1 / 3]),  # falls over the last three steps
    ],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_the_learning_rate_is_a_function_of_the_step(name, rates, tensor):
    """torchao keeps a group's rate in a tensor, which must stay the same one."""
    config = OptimConfig(lr=0.5, lr_schedule=name, warmup_steps_ratio=0.25, decay_steps_ratio=0.375)
    optimizer = torch.optim.AdamW([{"params": torch.zeros(2, requires_grad=True), "initial_lr": 0.5}], lr=0.5)
    [group] = optimizer.param_groups
    if tensor:
        group["lr"] = kept = torch.tensor(0.5)
    for done, rate in reversed(list(zip((0, 1, 2, 3, 6), rates, strict=True))):
        assert set_lr(optimizer, config, 8, done) == pytest.approx(rate)
        assert group["lr"] == pytest.approx(rate)
        assert not tensor or group["lr"] is kept


def test_without_torchao(small_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match=r"adamw_8bit needs torchao: pip install 'diffllm\[torchao\]'"):
        build_optimizer(small_model, OptimConfig(name="adamw_8bit"))


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_an_orthogonalised_matrix_has_singular_values_near_1(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.4
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert ((orthogonalise(matrix) * (u @ v)).sum() / values.norm() / min(shape) ** 0.5).item() > 0.95


def test_a_step_is_that_of_torch(small_model):
    """Of torch's Muon for the matrices of the layers, and of AdamW for the embedding, the head and the norms."""
    theirs, config = copy.deepcopy(small_model), OptimConfig(name="muon", lr=0.01, weight_decay=0.1)
    ours, matrices = build_optimizer(small_model, config), muon_matrices(theirs)
    others = [p for p in theirs.parameters() if not any(p is matrix for matrix in matrices)]
    decays = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in others]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizers = [muon, torch.optim.AdamW(decays, lr=0.01, betas=(0.9, 0.95))]
    assert len(matrices) == 7 * len(theirs.lm.model.layers)
    before = copy.deepcopy(small_model)
    for step in range(3):
        torch.manual_seed(step)
        for one, other in zip(small_model.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in (ours, *optimizers):
            optimizer.step()
    for one, other, first in zip(small_model.parameters(), theirs.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(one - first, other - first, rtol=0.02, atol=0.02 * (one - first).abs().max().item())


def test_muon_may_have_all_parameters_or_none(small_model):
    """LoRA trains matrices of the layers alone; a run may also train only the head."""
    for trained in (muon_matrices(small_model), [small_model.lm.lm_head.weight]):
        small_model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
            parameter.grad = torch.ones_like(parameter)
        before = [parameter.detach().clone() for parameter in trained]
        build_optimizer(small_model, OptimConfig(name="muon")).step()
        assert not any(torch.equal(*pair) for pair in zip(before, trained, strict=True))


def test_muon_trains_on_any_layout_and_resumes(small_run, train_on_two_ranks):
    muon = {"optim__name": "muon", "trainer__save_checkpoint_steps": 6}
    run = train(small_run("one", **muon))
    before = losses(run)
    assert before != losses(train(small_run("plain")))
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    assert losses(train(small_run("one", **muon))) == before
    train_on_two_ranks([small_run("two", **muon), small_run("copies", trainer__replicate=2, **muon)])
    for layout in ("two", "copies"):
        assert losses(run.parent / layout) == pytest.approx(before, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install 'diffllm[torchao]'")
def test_moments_in_8_bits_train_and_resume(small_run, train_on_two_ranks):
    eight_bit = {
        "optim__name": "adamw_8bit",
        "trainer__async_checkpoints": False,
        "trainer__save_checkpoint_steps": 6,
        "model__hidden_size": 64,
    }
    plain, run = train(small_run("plain", model__hidden_size=64)), train(small_run(**eight_bit))
    assert losses(run) == pytest.approx(losses(plain), rel=0.02)
    assert losses(run) != losses(plain)
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    before = losses(run)
    assert losses(train(small_run(**eight_bit))) == before
    train_on_two_ranks([small_run("two", **eight_bit)])
    assert losses(run.parent / "two") == pytest.approx(losses(plain), rel=0.02)
