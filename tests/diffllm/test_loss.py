"""The chunked cross entropy against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from diffllm import DiffusionConfig, loss
from diffllm.loss import masked_cross_entropy, weighted_sum


def test_chunks_change_neither_value_nor_gradient(monkeypatch):
    torch.manual_seed(0)
    V, D, N = 50, 8, 23
    results = []
    for chunk in (N, 5):
        monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", chunk * V)
        torch.manual_seed(1)
        head = torch.nn.Linear(D, V, bias=False)
        hidden = torch.randn(N, D, requires_grad=True)
        targets = torch.randint(V, (N,))
        nll, correct = masked_cross_entropy(head, hidden, targets, V)
        (nll * torch.arange(N)).sum().backward()
        results.append((nll.detach(), correct, hidden.grad, head.weight.grad))
        torch.testing.assert_close(nll, F.cross_entropy(head(hidden), targets, reduction="none"))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked)


def test_no_masked_token_gives_a_gradient_of_zero(small_model):
    x = torch.arange(8)[None]
    restored = small_model(x, x, torch.zeros_like(x, dtype=torch.bool))
    assert restored.nll.shape == (0,)
    restored.nll.sum().backward()
    assert all(not parameter.grad.any() for parameter in small_model.parameters())


def test_only_masked_positions_reach_the_head(small_model):
    seen = []
    small_model.lm.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[0]))
    x = torch.arange(20).reshape(2, 10)
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[0, 3:6] = True
    small_model(x.masked_fill(masked, small_model.mask_token_id), x, masked)
    assert seen == [3]


def test_the_embedding_of_the_end_of_sequence_learns(small_model):
    """It is the padding token too, whose embedding Transformers would freeze."""
    x_0 = torch.tensor([[1, 2, 3, small_model.eos_token_id]])
    masked = torch.tensor([[False, False, True, False]])
    small_model(x_0.masked_fill(masked, small_model.mask_token_id), x_0, masked).nll.sum().backward()
    assert small_model.lm.get_input_embeddings().weight.grad[small_model.eos_token_id].any()


def test_focal_reweighting():
    nll, config = torch.tensor([0.5, 2.0]), DiffusionConfig(token_reweighting=True)
    expected = sum(w * 0.25 * (1 - torch.exp(-x)) ** 2 * x for w, x in zip((1.0, 3.0), nll, strict=True))
    assert weighted_sum(nll, torch.tensor([1.0, 3.0]), config).item() == pytest.approx(expected.item())


def test_a_left_padded_row_has_the_loss_of_the_row_alone(small_model):
    x = torch.arange(10)[None]
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[0, 4:] = True
    x_t = x.masked_fill(masked, small_model.mask_token_id)
    pad = torch.nn.functional.pad
    attention_mask = pad(torch.ones_like(x), (3, 0))
    position_ids = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    with torch.no_grad():
        alone = small_model(x_t, x, masked).nll
        padded = small_model(pad(x_t, (3, 0)), pad(x, (3, 0)), pad(masked, (3, 0)), attention_mask, position_ids).nll
    torch.testing.assert_close(alone, padded, rtol=1e-5, atol=1e-6)
