"""Convert a visibility for the decoder's attention: to no mask, a mask, or one long row without padding."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from diffllm.block_attention import attend
from diffllm.families import has_window
from sampling import Visibility, to_device

# torch 2.11 takes fewer heads of keys than of queries without being told
GROUPED = {} if Version(torch.__version__) < Version("2.12") else {"enable_gqa": True}


def visibility_of(batch: Mapping[str, Tensor]) -> Visibility:
    """Visibility of a training batch, on the host.

    Args:
        batch: attention_mask [B, L], 0 at left padding; optional document [B, L], block [B, L] and pairs
            [B, L, L].
    """
    conditions = {name: batch[name] for name in ("document", "block", "pairs") if name in batch}
    if not bool(batch["attention_mask"].all()):
        conditions["attended"] = batch["attention_mask"].bool()
    return Visibility(**conditions)


def mask_of(
    visibility: Visibility, dtype: torch.dtype, columns: Tensor | None = None, windowed: bool = False
) -> Tensor | None:
    """Mask for Transformers' decoders: None, or 0 and -inf that broadcast to [B, 1, Q, L].

    All layers share it, where each would convert a bool mask. Its rows begin at multiples of 8 numbers: those of others
    would be copied in each layer on a GPU.

    Args:
        dtype: of the queries.
        columns: [B, Q] positions of the queries if others are cached; None for all.
        windowed: some layers have a window, which the decoder joins with the padding [B, L].
    """
    if windowed:
        return visibility.attended
    visible = visibility.dense(columns)
    if visible is None:
        return None
    width = visible.shape[-1]
    aligned = torch.full((*visible.shape[:-1], -(-width // 8) * 8), -torch.inf, dtype=dtype, device=visible.device)
    return aligned[..., :width].masked_fill_(visible, 0)[:, None]


def without_padding(visibility: Visibility, x_t: Tensor, position_ids: Tensor) -> tuple[dict[str, Any], Tensor]:
    """All attended tokens as one row, in which each row or document of the batch sees only itself.

    The layout is computed on the host: a visibility that is there needs no synchronisation with the GPU.

    Returns:
        The decoder's inputs, and the index [B, L] of each attended position in that row.
    """
    attended = torch.ones(x_t.shape, dtype=torch.bool) if visibility.attended is None else visibility.attended.cpu()
    attended = attended.bool()
    segment = torch.arange(len(x_t))[:, None].expand_as(x_t)
    if visibility.document is not None:
        document = visibility.document.cpu()
        segment = segment * (document.max() + 1) + document
    lengths = segment[attended].unique_consecutive(return_counts=True)[1]
    longest = int(lengths.max())
    bounds, index, place = (
        to_device(tensor, x_t.device)
        for tensor in (
            F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            attended.flatten().nonzero().squeeze(-1),
            attended.flatten().cumsum(0).view_as(attended) - 1,
        )
    )
    inputs = {
        "input_ids": x_t.flatten()[index][None],
        "position_ids": position_ids.flatten()[index][None],
        **{"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest},
        **({"causal": True} if visibility.causal else {}),
    }
    return inputs, place


def head_size(config: PreTrainedConfig) -> int:
    """Dimensions of a head of the attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def has_segments(config: PreTrainedConfig) -> bool:
    """Whether varlen can attend within segments: no window, no dropout, and heads that FlashAttention takes."""
    size, dropout = head_size(config), getattr(config, "attention_dropout", 0.0)
    return not has_window(config) and not dropout and size % 8 == 0 and size <= 256


def attention_for(setting: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> str:
    """The attention of a model: `auto` is varlen on GPUs that have it, else sdpa.

    Args:
        device, dtype: of the forward. Without a device nothing is checked, and `auto` is sdpa.

    Raises:
        ValueError: FlashAttention without a GPU, or varlen on a GPU or in a dtype that does not have it.
    """
    on_gpu = device is not None and device.type == "cuda"
    if "flash" in setting and device is not None and not on_gpu:
        raise ValueError(f"model.attn_implementation={setting} needs a GPU, and none is here; use sdpa or varlen")
    if not on_gpu or setting not in ("auto", "varlen"):
        return "sdpa" if setting == "auto" else setting
    supported = dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(device) >= (8, 0)
    if setting == "varlen" and not supported:
        raise ValueError(
            f"model.attn_implementation=varlen needs bf16 and a GPU of compute capability 8.0 (Ampere) or above, and "
            f"this is {dtype} on {torch.cuda.get_device_name(device)}; use sdpa"
        )
    return "varlen" if supported else "sdpa"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    causal: bool = False,
    plan: Any = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of the interface of Transformers: by blocks or within segments if they are given, else SDPA.

    Args:
        query, key, value: [B, H, L, D]; with bounds B is 1.
        cu_seq_lens_q: [S + 1] int32, where the S segments of the row begin, and its length.
        max_length_q: tokens of the longest segment.
        causal: a token sees nothing after it.
        plan: of `diffllm.block_attention.attention_plan`.

    Returns:
        [B, L, H, D], and no weights.
    """
    if plan is not None:
        return attend(query, key, value, plan, scaling), None
    if cu_seq_lens_q is None:
        groups = query.shape[1] // key.shape[1]
        if attention_mask is not None and not torch.is_grad_enabled() and groups * query.shape[2] <= key.shape[2]:
            return attend_in_groups(query, key, value, attention_mask, scaling), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    if query.is_cuda:
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        bounds, longest = cu_seq_lens_q, max_length_q
        window = (-1, 0) if causal else (-1, -1)
        attended = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window, **GROUPED)
        return attended[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    segments = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    attend_within = partial(F.scaled_dot_product_attention, scale=scaling, is_causal=causal, enable_gqa=True)
    attended = [attend_within(*segment) for segment in segments]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def attend_in_groups(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """[B, Q, H, D] attention of few queries, whose heads that share keys lie side by side.

    Transformers would copy the keys and values for each head where there is a mask.

    Args:
        mask: broadcasts to [B, 1, Q, L].
    """
    rows, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    together = query.reshape(rows, key.shape[1], groups * queries, size)
    mask = mask if mask.shape[2] == 1 else mask.repeat(1, 1, groups, 1)
    attended = F.scaled_dot_product_attention(together, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(query.shape).transpose(1, 2)


AttentionInterface.register("varlen", varlen_attention)
AttentionMaskInterface.register("varlen", sdpa_mask)
