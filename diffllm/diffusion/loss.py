"""The loss: weighted cross entropy of the masked tokens, with its gradient computed in the forward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

LOGITS_PER_CHUNK = 2**26  # at most; 256 MiB in float32

Slope = Callable[[Tensor], Tensor]  # nll [n] → d loss / d nll


class LossOutput(NamedTuple):
    """Loss of the N masked positions. Only the loss carries a gradient."""

    loss: Tensor  # scalar, Σ weight·token loss, float32
    nll: Tensor  # [N] negative log-likelihood of the clean tokens, float32
    correct: Tensor  # [N] whether the most likely token is the clean one


class TokenLoss:
    """A function of a token's nll, and its derivative. The base class is cross entropy, the nll itself."""

    def __call__(self, nll: Tensor) -> Tensor:
        """[n] losses of tokens."""
        return nll

    def derivative(self, nll: Tensor) -> Tensor:
        """[n] d loss / d nll."""
        return torch.ones_like(nll)

    def select(self, tokens: slice) -> "TokenLoss":
        """The loss of some of the N tokens; override it if tokens have losses of their own."""
        return self


CROSS_ENTROPY = TokenLoss()


@dataclass(frozen=True)
class Focal(TokenLoss):
    """alpha·(1 - p)^gamma·nll with p = exp(-nll): likely tokens count less (arXiv 1708.02002, eq. 5)."""

    alpha: float
    gamma: float

    def __call__(self, nll: Tensor) -> Tensor:
        return self.alpha * (1 - torch.exp(-nll)) ** self.gamma * nll

    def derivative(self, nll: Tensor) -> Tensor:
        """alpha·(1 - p)^gamma + alpha·gamma·(1 - p)^(gamma - 1)·p·nll."""
        p = torch.exp(-nll)
        # nll/(1 - p) tends to 1 as p does: no gamma divides 0 by 0.
        ratio = torch.where(nll > 0, nll / -torch.expm1(-nll), 1.0)
        return self.alpha * (1 - p) ** self.gamma * (1 + self.gamma * p * ratio)


def masked_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, token_loss: TokenLoss = CROSS_ENTROPY
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ weight·token loss through the vocabulary projection, a chunk of positions at a time.

    Weights are known before the forward pass, so it also computes the gradients of `hidden` and `head` from each
    chunk's logits. Logits are neither kept nor recomputed. In bf16 the head's gradient is accumulated over chunks in
    bf16.

    Args:
        hidden: [N, D] hidden states that predict the masked tokens.
        head: [V, D] vocabulary projection.
        targets: [N] clean tokens.
        weights: [N] float32.
        token_loss: function of a token's nll.

    Returns:
        The loss, a float32 scalar; nll [N] in float32 and correct [N], whether the most likely token is the target,
        both without gradient.
    """
    training = torch.is_grad_enabled()
    return _MaskedLoss.apply(hidden, head, targets, weights, token_loss, training, _in_place, LOGITS_PER_CHUNK)


def weighted_sum(nll: Tensor, weights: Tensor, token_loss: TokenLoss = CROSS_ENTROPY) -> Tensor:
    """Σ weight·token loss over the masked positions, the numerator of the loss."""
    return (weights * token_loss(nll)).sum()


def liger() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`masked_loss` by Liger's Triton kernel (arXiv 2410.10989), which recomputes logits in the backward pass.

    Raises:
        ValueError: Liger is missing, or older than 0.8.2, which scales all gradients by the first token's weight.
    """
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise ValueError("model.loss_kernel=liger is not installed: pip install 'diffllm[liger]'") from error
    if Version(installed := version("liger-kernel")) < Version("0.8.2"):
        raise ValueError(f"model.loss_kernel=liger: {installed} gives wrong gradients: pip install 'diffllm[liger]'")

    def liger_loss(hidden, head, targets, weights, token_loss=CROSS_ENTROPY):
        if not len(hidden):  # the kernel divides by it
            return masked_loss(hidden, head, targets, weights, token_loss)
        output = liger_fused_linear_cross_entropy(
            hidden, head, targets, reduction="none", return_predicted_tokens=True, accum_dtype=torch.float32
        )
        nll = output.loss.float()
        value = nll.detach().clamp(min=0)
        linear = (weights * token_loss.derivative(value) * nll).sum()  # has the gradient, but not the value
        loss = linear + (weighted_sum(value, weights, token_loss) - linear).detach()
        return loss, value, output.predicted_tokens == targets

    return liger_loss


def compiled(backend: str | Callable) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`masked_loss` whose work on the logits of a chunk is compiled: it reads them in their own dtype, in few passes.

    Args:
        backend: of torch.compile.
    """
    rate, differentiate = (torch.compile(part, backend=backend) for part in (_rate, _differentiate))

    def chunk_loss(logits: Tensor, targets: Tensor, slope: Slope | None) -> tuple[Tensor, Tensor, Tensor | None]:
        nll, correct, log_total = rate(logits, targets)
        return nll, correct, None if slope is None else differentiate(logits, targets, log_total, slope(nll))

    def compiled_loss(hidden, head, targets, weights, token_loss=CROSS_ENTROPY):
        training = torch.is_grad_enabled()
        return _MaskedLoss.apply(hidden, head, targets, weights, token_loss, training, chunk_loss, 2 * LOGITS_PER_CHUNK)

    return compiled_loss


def _rate(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """nll, whether the most likely token is the target, and the logarithm of Σ exp(logits), each [n]."""
    values = logits.float()
    log_total = values.logsumexp(-1)
    nll = log_total - values.gather(-1, targets[:, None]).squeeze(-1)
    return nll, values.argmax(-1) == targets, log_total


def _differentiate(logits: Tensor, targets: Tensor, log_total: Tensor, slope: Tensor) -> Tensor:
    """[n, V] slope·(softmax - onehot), in the dtype of the logits."""
    p = (logits.float() - log_total[:, None]).exp()
    is_target = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    return ((p - is_target.float()) * slope[:, None]).to(logits.dtype)


def _in_place(logits: Tensor, targets: Tensor, slope: Slope | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same as `_rate` and `_differentiate`, operator by operator in one float32 copy of the logits."""
    dtype, y, logits = logits.dtype, targets[:, None], logits.float()
    highest, likeliest = logits.max(-1, keepdim=True)
    target = logits.gather(-1, y)
    correct = (likeliest == y).squeeze(-1)
    p = logits.sub_(highest).exp_()
    total = p.sum(-1, keepdim=True)
    nll = (total.log() + highest - target).squeeze(-1)
    if slope is None:
        return nll, correct, None
    factor = slope(nll)[:, None]
    return nll, correct, p.mul_(factor / total).scatter_add_(-1, y, -factor).to(dtype)


class _MaskedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, weights, token_loss, training, chunk_loss, logits_per_chunk):
        hidden_needs, head_needs = (training and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if hidden_needs else None
        grad_head = torch.zeros_like(head) if head_needs and not len(hidden) else None
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        correct = targets.new_empty(len(hidden), dtype=torch.bool)
        chunks = -(-len(hidden) * len(head) // logits_per_chunk)
        size = -(-len(hidden) // max(chunks, 1))
        for start in range(0, len(hidden), max(size, 1)):
            chunk = slice(start, start + size)

            def slope(nll: Tensor, chunk: slice = chunk) -> Tensor:  # d loss / d logits = slope·(softmax - onehot)
                return weights[chunk] * token_loss.select(chunk).derivative(nll)

            h, slope_of = hidden[chunk], slope if hidden_needs or head_needs else None
            nll[chunk], correct[chunk], grad = chunk_loss(h @ head.T, targets[chunk], slope_of)
            if hidden_needs:
                torch.mm(grad, head, out=grad_hidden[chunk])
            if head_needs:
                grad_head = grad.T @ h if grad_head is None else grad_head.addmm_(grad.T, h)
            del grad  # free it before the next chunk
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(nll, correct)
        return weighted_sum(nll, weights, token_loss), nll, correct

    @staticmethod
    def backward(ctx, grad_loss, *_):
        scaled = (None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors)
        return *scaled, *[None] * 6
