"""Convert a visibility for the decoder's attention: to no mask, a mask, or one long row without padding."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sampling import Visibility


def visibility_of(batch: Mapping[str, Tensor], device: torch.device) -> Visibility:
    """Visibility of a training batch, on the model's device.

    Args:
        batch: on the host: attention_mask [B, L], 0 at left padding; optional document [B, L], block [B, L] and pairs
            [B, L, L].
    """
    conditions = {name: batch[name] for name in ("document", "block", "pairs") if name in batch}
    if not bool(batch["attention_mask"].all()):
        conditions["attended"] = batch["attention_mask"].bool()
    return Visibility(**{name: value.to(device, non_blocking=True) for name, value in conditions.items()})


def mask_of(visibility: Visibility, columns: Tensor | None = None) -> Tensor | None:
    """Bool mask for Transformers' decoders: None, [B, L] for padding alone, else [B, 1, Q, L].

    Args:
        columns: [B, Q] positions of the queries if others are cached; None for all.
    """
    if visibility.document is None and not visibility.needs_pairs:
        return visibility.attended
    return visibility.dense(columns)[:, None]


def without_padding(
    visibility: Visibility, x_t: Tensor, position_ids: Tensor, flash: bool
) -> tuple[dict[str, Any], Tensor]:
    """All attended tokens as one row, in which each row or document of the batch sees only itself.

    Args:
        flash: give cumulative lengths to the attention, not a mask.

    Returns:
        The decoder's inputs, and the index [B, L] of each attended position in that row.
    """
    attended = torch.ones_like(x_t, dtype=torch.bool) if visibility.attended is None else visibility.attended.bool()
    segment = torch.arange(len(x_t), device=x_t.device)[:, None].expand_as(x_t)
    if (document := visibility.document) is not None:
        segment = segment * (document.max() + 1) + document
    segment = segment[attended]
    inputs: dict[str, Any] = {"input_ids": x_t[attended][None], "position_ids": position_ids[attended][None]}
    if flash:
        lengths = segment.unique_consecutive(return_counts=True)[1]
        bounds, longest = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), int(lengths.max())
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        inputs |= {"max_length_q": longest, "max_length_k": longest}
    else:
        inputs["attention_mask"] = (segment[:, None] == segment)[None, None]
    return inputs, attended.flatten().cumsum(0).view_as(attended) - 1
