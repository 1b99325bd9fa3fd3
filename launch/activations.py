"""Memory of a forward and backward pass, counted over tensors without data.

On the four shapes of tests/launch/test_plan.py this count is within 1 % of a process's peak. torch's FSDPMemTracker is
within 1 % on three and 8 % above on `full`, takes 2 to 6 times as long, and needs a process group.
"""

import copy
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from diffllm import DiffLLM
from trainer.config import Config
from trainer.parallel import recompute_activations


class PassMemory(NamedTuple):
    """Bytes of a micro-batch's forward and backward pass, beyond parameters and their gradients."""

    kept: int  # from the forward for the backward pass
    loss: int  # peak beyond `kept` in the loss, with the gradient of the head
    backward: int  # peak beyond `kept` in the backward pass of the layers, with recomputation


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that are made in the block, without tensors `outside`."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Let compiled layers run: torch would not compile inside a mode that may change results."""
        return True

    def __init__(self, outside: Iterable[Tensor]):
        super().__init__()
        self.known = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in outside})
        self.now = self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known[storage] = None
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def needs_mask(config: Config) -> bool:
    """Whether the attention gets a mask of all pairs. Others get rows without padding, tiles, or the padding alone."""
    objective, sdpa = config.diffusion, config.model.attn_implementation == "sdpa"
    by_row = objective.causal or objective.block_length is not None or config.data.packing
    return objective.attention_annealing_steps > 0 or (sdpa and by_row)


def pass_memory(model: DiffLLM, config: Config, rows: int, dtype: torch.dtype, compiling: bool = False) -> PassMemory:
    """Memory of a micro-batch of `rows`, computed in `dtype`; all positions but those of copies are masked.

    Runs three layers, since all keep equally much, on a fake CPU, whose attention keeps no L×L scores, as on a GPU.

    Args:
        compiling: the layers are compiled. The compiler decides what they keep; its code is not made.
    """
    model, length, layers = copy.deepcopy(model), config.data.max_length, model.lm.config.num_hidden_layers
    width = length * config.diffusion.copies
    decoder, at_layer = model.lm.get_decoder(), []
    decoder.layers = decoder.layers[:3]
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda *_: at_layer.append(live.now))
    with FakeTensorMode():
        model._apply(lambda t: torch.empty(t.shape, dtype=dtype if isinstance(t, nn.Parameter) else t.dtype)).train()
        model.lm.tie_weights()
        recompute_activations(model, config.model, compiling)
        if compiling:
            torch._dynamo.reset()  # after some compilations of the same code, also by earlier calls, it gives up
        for layer in decoder.layers if compiling else ():
            layer.compile(backend="aot_eager_decomp_partition", dynamic=False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        outside = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in trained)]
        with LiveBytes(outside) as live:
            embedded = torch.empty(rows, width, decoder.config.hidden_size, dtype=dtype)
            embedded.requires_grad_(decoder.embed_tokens.weight.requires_grad)
            positions = torch.empty(rows, width, dtype=torch.long)
            mask = torch.empty(rows, 1, width, width, dtype=dtype) if needs_mask(config) else None
            output = decoder(inputs_embeds=embedded, attention_mask=mask, position_ids=positions)
            index = positions[:, :length].flatten()
            states = output.last_hidden_state[index, index]
            del output
            kept = live.peak = live.now
            hidden = states.detach().requires_grad_()
            weights = torch.empty(len(index))
            model.masked_loss(hidden, model.lm.lm_head.weight, index, weights)[0].backward()
            loss, live.peak = live.peak - kept, live.now
            states.backward(hidden.grad)
    others = (layers - 3) * (at_layer[2] - at_layer[1]) if layers > 3 else 0
    return PassMemory(kept + others, loss, live.peak - kept)
