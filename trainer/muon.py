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

    Sharded matrices are gathered, so that an update does not depend on the layout. There are as many at once as ranks,
    and each rank orthogonalises one of them.

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
        # LoRA trains matrices alone, and AdamW takes no empty list.
        self._adamw = AdamW(others or [{"params": []}], lr=lr, **settings)
        group = {"params": list(matrices), "weight_decay": weight_decay}
        super().__init__([group, *self._adamw.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update all parameters that have a gradient."""
        group, *others = self.param_groups
        self._adamw.param_groups, self._adamw.state = others, self.state  # which load_state_dict replaces
        self._adamw.step()
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        at_once = _shards(matrices[0]) if matrices else 1
        for start in range(0, len(matrices), at_once):
            some = matrices[start : start + at_once]
            for matrix, update in zip(some, _orthogonalised([*map(self._momentum, some)]), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * RMS * sqrt(max(matrix.shape)))

    def _momentum(self, matrix: Tensor) -> Tensor:
        """Nesterov's momentum, after the gradient has been added to it."""
        if "momentum_buffer" not in self.state[matrix]:
            self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        momentum = self.state[matrix]["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(momentum, MOMENTUM)


def _shards(matrix: Tensor) -> int:
    """Ranks that share the work on matrices; 1 if a rank works alone, or with copies of the shards (HSDP)."""
    return matrix.device_mesh.size() if isinstance(matrix, DTensor) and matrix.device_mesh.ndim == 1 else 1


def _orthogonalised(updates: list[Tensor]) -> list[Tensor]:
    """Orthogonalise updates, of sharded ones the i-th on rank i."""
    if not isinstance(updates[0], DTensor):
        return [*map(orthogonalise, updates)]
    whole, mesh = [update.full_tensor() for update in updates], updates[0].device_mesh
    shared = _shards(updates[0]) > 1
    for i in [mesh.get_local_rank()] if shared else range(len(whole)):
        whole[i : i + 1] = [orthogonalise(each) for each in whole[i : i + 1]]
    return [
        distribute_tensor(each, mesh, update.placements, src_data_rank=i if shared else None)
        for i, (each, update) in enumerate(zip(whole, updates, strict=True))
    ]


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
