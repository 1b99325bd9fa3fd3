"""Muon: orthogonalised momentum for the matrices of layers, AdamW for all other parameters.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. An update has the root mean square of AdamW's, so both
have one learning rate and weight decay (Liu et al., arXiv 2502.16982, eq. 4).
"""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

MOMENTUM = 0.95
RMS = 0.2  # of an AdamW update, about
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Optimizes matrices by Muon and other groups of parameters by AdamW.

    A sharded matrix is gathered, so that its update does not depend on the layout.

    Args:
        matrices: [M, N] each, of the layers: no embedding and no head.
        others: groups for AdamW.
        settings: of AdamW.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        others: Sequence[dict[str, Any]],
        lr: float,
        weight_decay: float,
        **settings: Any,
    ):
        self._adamw = AdamW(others, lr=lr, **settings)
        group = {"params": list(matrices), "weight_decay": weight_decay}
        super().__init__([group, *self._adamw.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update all parameters that have a gradient."""
        group, *others = self.param_groups
        self._adamw.param_groups, self._adamw.state = others, self.state  # which load_state_dict replaces
        self._adamw.step()
        for matrix in group["params"]:
            if matrix.grad is None:
                continue
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
            momentum = self.state[matrix]["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
            update = _sharded(matrix.grad.lerp(momentum, MOMENTUM))  # Nesterov's
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(update, alpha=-group["lr"] * RMS * sqrt(max(matrix.shape)))


def _sharded(update: Tensor) -> Tensor:
    """Orthogonalise an update, gathered if it is sharded."""
    if not isinstance(update, DTensor):
        return orthogonalise(update)
    whole = orthogonalise(update.full_tensor())
    return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)


def orthogonalise(update: Tensor) -> Tensor:
    """Replace the singular values of a matrix [M, N] by about 1, through Newton–Schulz iterations.

    A GPU computes them in bfloat16.
    """
    x = update.bfloat16() if update.is_cuda else update
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if update.shape[0] > update.shape[1] else x).to(update.dtype)
