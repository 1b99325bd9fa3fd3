"""A GPU that is not there: its tensors say that they are on another device, and are computed on the CPU.

As CUDA does, it refuses operators on tensors of two devices. It counts what makes the host wait for a GPU: values that
are read back, and copies of memory that is not pinned.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")  # once a process, which can then have no other accelerator
DEVICE = torch.device("pretended:0")
# Operators whose results have values, or shapes, that the host reads.
READS = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2", "unique_consecutive", "unique_dim"}
INDEXES = {"index", "index_put", "index_put_"}


class OnGPU(Tensor):
    """A tensor of the pretended GPU, around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGPU":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, **layout)
        tensor.held = held
        return tensor

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        raise RuntimeError(f"{operator}: no GPU is pretended")


class PretendedGPU(TorchDispatchMode):
    """While it is active, tensors may be on DEVICE.

    Attributes:
        waits: number of waits of the host, by operator.
    """

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operator.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if kwargs.get("device") != DEVICE and not any(isinstance(tensor, OnGPU) for tensor in tensors):
            return operator(*args, **kwargs)
        held = operator(*tree_map(_held, args), **tree_map(_held, kwargs))
        if name in ("_to_copy", "copy_"):
            target = args[0].device if name == "copy_" else kwargs.get("device") or args[0].device
            self._count_copy(name, tensors[-1], target, kwargs.get("non_blocking") or True in args[2:])
            return args[0] if name == "copy_" else OnGPU(held) if target == DEVICE else held
        self._check(name, args, tensors)
        given = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnGPU)}

        def placed(leaf):
            if not isinstance(leaf, Tensor):
                return leaf
            return given[id(leaf)] if id(leaf) in given else OnGPU(leaf)

        return return_and_correct_aliasing(operator, args, kwargs, tree_map(placed, held))

    def _count_copy(self, name: str, source: Tensor, target: torch.device, non_blocking: bool) -> None:
        """Count a copy to the other device, but one that goes on by itself."""
        if target != source.device and not (non_blocking and getattr(source, "is_page_locked", False)):
            self.waits[name] += 1

    def _check(self, name: str, args: tuple, tensors: list[Tensor]) -> None:
        """Count a wait, or refuse tensors of two devices. Numbers and indices may be on the host."""
        indices = [index for index in args[1] if index is not None] if name in INDEXES else []
        if name in READS or any(index.dtype == torch.bool or not isinstance(index, OnGPU) for index in indices):
            self.waits[name] += 1
        for tensor in tensors:
            if tensor.ndim and not isinstance(tensor, OnGPU) and not any(tensor is index for index in indices):
                raise RuntimeError(f"{name}: tensors of two devices, one is {list(tensor.shape)} on the host")


def _held(leaf):
    if isinstance(leaf, OnGPU):
        return leaf.held
    return torch.device("cpu") if leaf == DEVICE else leaf


def _pin(tensor: Tensor) -> Tensor:
    pinned = tensor.clone()
    pinned.is_page_locked = True
    return pinned


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """A GPU for this process, which can have no other accelerator from then on."""
    on_one_thread = torch.autograd.set_multithreading_enabled(False)  # as the mode is of this thread
    with patch.object(Tensor, "pin_memory", _pin), on_one_thread, PretendedGPU() as gpu:
        yield gpu
