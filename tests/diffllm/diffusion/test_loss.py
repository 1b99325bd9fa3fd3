"""The fused loss against autograd through full logits."""

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from diffllm.diffusion import loss
from diffllm.diffusion.loss import CROSS_ENTROPY, Focal, TokenLoss, masked_loss, weighted_sum
from sampling import Visibility

V, D, N = 50, 8, 23


@dataclass(frozen=True)
class ClippedRatio(TokenLoss):
    """-min(r·A, clip(r, 1-ε, 1+ε)·A) with r = exp(old_nll - nll) (PPO, arXiv 1707.06347, eq. 7)."""

    old_nll: torch.Tensor  # [N] under the policy that sampled the tokens
    advantage: torch.Tensor  # [N]
    epsilon: float = 0.2

    def __call__(self, nll):
        ratio = torch.exp(self.old_nll - nll)
        return -torch.minimum(ratio * self.advantage, self._clip(ratio) * self.advantage)

    def derivative(self, nll):
        """r·A where the ratio is not clipped, 0 where it is."""
        ratio = torch.exp(self.old_nll - nll)
        return torch.where(ratio * self.advantage <= self._clip(ratio) * self.advantage, ratio * self.advantage, 0.0)

    def select(self, tokens):
        return replace(self, old_nll=self.old_nll[tokens], advantage=self.advantage[tokens])

    def _clip(self, ratio):
        return ratio.clamp(1 - self.epsilon, 1 + self.epsilon)


CLIPPED = ClippedRatio(torch.linspace(1, 12, N), torch.tensor([1.0, -1.0, 0.5]).repeat(N)[:N])


def by_autograd(hidden, head, targets, weights, token_loss):
    """The loss as its definition says, all logits at once."""
    logits = (hidden @ head.T).float()
    nll = F.cross_entropy(logits, targets, reduction="none")
    return weighted_sum(nll, weights, token_loss), nll, logits.argmax(-1) == targets


def value_and_gradients(kernel, dtype, token_loss, frozen=()):
    torch.manual_seed(1)
    hidden, head = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    hidden.requires_grad_("hidden" not in frozen)
    head.requires_grad_("head" not in frozen)
    total, nll, correct = kernel(hidden, head, torch.randint(V, (N,)), torch.rand(N), token_loss)
    (total / 3).backward()
    return total.detach(), nll.detach(), correct, hidden.grad, head.grad


TOKEN_LOSSES = [CROSS_ENTROPY, Focal(0.25, 2.0), Focal(1.0, 0.0), Focal(1.0, 0.5), CLIPPED]


@pytest.mark.parametrize("chunk", [N, 5, 1])
@pytest.mark.parametrize("token_loss", TOKEN_LOSSES, ids=lambda loss: type(loss).__name__)
def test_value_and_gradient_are_those_of_autograd(monkeypatch, chunk, token_loss):
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", chunk * V)
    for ours, theirs in zip(
        value_and_gradients(masked_loss, torch.float32, token_loss),
        value_and_gradients(by_autograd, torch.float32, token_loss),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bf16_is_as_near_to_float32_as_autograd_is(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 12 * V)
    for ours, theirs in zip(
        value_and_gradients(masked_loss, torch.bfloat16, CROSS_ENTROPY),
        value_and_gradients(by_autograd, torch.bfloat16, CROSS_ENTROPY),
        strict=True,
    ):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)


def test_a_bf16_gradient_is_not_scaled_by_a_rounded_denominator():
    """1 / 1021 rounds to bf16 with an error of 0.4 %."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        hidden = torch.randn(N, D).bfloat16().to(dtype).requires_grad_()
        head = torch.randn(V, D).bfloat16().to(dtype)
        (masked_loss(hidden, head, torch.randint(V, (N,)), torch.ones(N))[0] / 1021).backward()
        gradients.append(hidden.grad.float())
    exact, rounded = gradients
    assert ((rounded * exact).sum() / exact.square().sum()).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient(frozen):
    *_, hidden, head = value_and_gradients(masked_loss, torch.float32, CROSS_ENTROPY, frozen=[frozen])
    assert (hidden is None, head is None) == (frozen == "hidden", frozen == "head")


def test_the_focal_gradient_of_a_token_that_is_known_for_sure():
    nll = torch.tensor([0.0, 1e-12, 200.0])
    assert Focal(0.25, 2.0).derivative(nll).tolist() == pytest.approx([0, 0, 0.25])
    assert Focal(0.25, 0.5).derivative(nll).isfinite().all()


def test_no_masked_token_gives_a_gradient_of_zero(small_model):
    x = torch.arange(8)[None]
    restored = small_model(x, x, torch.zeros_like(x, dtype=torch.bool), torch.zeros(x.shape))
    assert restored.nll.shape == (0,)
    restored.loss.backward()
    assert all(not parameter.grad.any() for parameter in small_model.parameters())


def test_only_masked_positions_reach_the_head(small_model):
    seen = []
    small_model.masked_loss = lambda hidden, *rest: (seen.append(len(hidden)), *masked_loss(hidden, *rest))[1:]
    x = torch.arange(20).reshape(2, 10)
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[0, 3:6] = True
    small_model(x.masked_fill(masked, small_model.mask_token_id), x, masked, masked.float())
    assert seen == [3]


def test_the_embedding_of_the_end_of_sequence_learns(small_model):
    """It is the padding token too, whose embedding Transformers would freeze."""
    x_0 = torch.tensor([[1, 2, 3, small_model.eos_token_id]])
    masked = torch.tensor([[False, False, True, False]])
    small_model(x_0.masked_fill(masked, small_model.mask_token_id), x_0, masked, masked.float()).loss.backward()
    assert small_model.lm.get_input_embeddings().weight.grad[small_model.eos_token_id].any()


def test_focal_reweighting():
    nll = torch.tensor([0.5, 2.0])
    expected = sum(w * 0.25 * (1 - torch.exp(-x)) ** 2 * x for w, x in zip((1.0, 3.0), nll, strict=True))
    assert weighted_sum(nll, torch.tensor([1.0, 3.0]), Focal(0.25, 2.0)).item() == pytest.approx(expected.item())


def left_padded_rows(model):
    """Three rows of 10, 7 and 4 tokens, the last 3 of each masked, on one canvas of 10."""
    torch.manual_seed(0)
    lengths = torch.tensor([10, 7, 4])
    attention_mask = (torch.arange(10) >= 10 - lengths[:, None]).long()
    x_0 = torch.randint(200, (3, 10)) * attention_mask
    masked = (torch.arange(10) >= 7).expand(3, 10)
    position_ids = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    return x_0.masked_fill(masked, model.mask_token_id), x_0, masked, masked.float(), attention_mask, position_ids


def set_unpad(model, unpad):
    model.unpad = unpad
    model.lm.set_attn_implementation("varlen" if unpad else "sdpa")


@pytest.mark.parametrize("unpad", [False, True])
def test_a_left_padded_row_has_the_loss_of_the_row_alone(small_model, unpad):
    set_unpad(small_model, unpad)
    batch = left_padded_rows(small_model)
    with torch.no_grad():
        together = small_model(*batch).nll.unflatten(0, (3, 3))
        for row, length in enumerate((10, 7, 4)):
            alone = small_model(*(tensor[row : row + 1, -length:] for tensor in batch)).nll
            torch.testing.assert_close(alone, together[row], rtol=1e-5, atol=1e-6)


def test_unpadded_rows_have_the_gradient_of_padded_ones(small_model):
    gradients = []
    for unpad in (False, True):
        set_unpad(small_model, unpad)
        small_model.zero_grad()
        small_model(*left_padded_rows(small_model)).loss.backward()
        gradients.append([parameter.grad for parameter in small_model.parameters()])
    for padded, unpadded in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, unpadded, rtol=1e-4, atol=1e-6)


def test_liger_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    with pytest.raises(ValueError, match=r"liger is not installed: pip install 'diffllm\[liger\]'"):
        loss.liger()


def test_the_former_arguments_of_forward(small_model):
    """A token loss as `focal`, and visible pairs as `visible`, give what their new names give."""
    batch, pairs = left_padded_rows(small_model), torch.ones(3, 10, 10).tril().bool()
    with torch.no_grad():
        former = small_model(*batch, Focal(0.25, 2.0), pairs)
        seen = Visibility(attended=batch[4], pairs=pairs)
        new = small_model(*batch[:4], position_ids=batch[5], token_loss=Focal(0.25, 2.0), visibility=seen)
        plain = small_model(*batch)
    assert torch.equal(former.loss, new.loss)
    assert not torch.equal(former.nll, plain.nll)


@pytest.mark.parametrize("frozen", [(), ("head",), ("hidden", "head")], ids=str)
@pytest.mark.parametrize("token_loss", TOKEN_LOSSES, ids=lambda each: repr(each)[:20])
def test_the_compiled_loss(monkeypatch, token_loss, frozen):
    """In chunks of 5 positions and a last one of 2; Dynamo alone traces it, without a compiler."""
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 5 * V // 2)
    kernels = loss.compiled("eager"), masked_loss
    if len(frozen) == 2:
        hidden, head, targets, weights = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,)), torch.rand(N)
        made = [kernel(hidden, head, targets, weights, token_loss) for kernel in kernels]
    else:
        made = [value_and_gradients(kernel, torch.float32, token_loss, frozen) for kernel in kernels]
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("token_loss", TOKEN_LOSSES, ids=lambda each: repr(each)[:20])
def test_the_loss_around_ligers_kernel(monkeypatch, token_loss):
    """Plain torch stands in for the kernel, which needs a GPU."""

    def kernel(hidden, head, targets, **_):
        logits = (hidden @ head.T).float()
        nll = F.cross_entropy(logits, targets, reduction="none")
        return SimpleNamespace(loss=nll, predicted_tokens=logits.argmax(-1))

    functional = SimpleNamespace(liger_fused_linear_cross_entropy=kernel)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setattr(loss, "version", lambda _: "0.8.2")
    ours = value_and_gradients(loss.liger(), torch.float32, token_loss)
    for value, expected in zip(ours, value_and_gradients(masked_loss, torch.float32, token_loss), strict=True):
        torch.testing.assert_close(value, expected)
