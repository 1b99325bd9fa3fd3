"""Pack the rows of a micro-batch into fewer longer ones, in which each attends to itself alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.workers import Batch


def noise_and_pack(noise: Callable[[Batch, int], Batch], size: int, batch: Batch, epoch: int) -> Batch:
    """Noise a batch, then pack it: a row has the noise and the weights that it has alone."""
    return pack(noise(batch, epoch), size)


def pack(batch: Batch, size: int) -> Batch:
    """Pack rows into rows of at most `size` tokens. The batch comes back as it is if that leaves no padding out.

    Args:
        batch: attention_mask [B, L], 0 at padding; tensors [B, L, …] are packed, others stay.

    Returns:
        The batch with document [R, W], which limits attention, and packed_row [R, W], the former row of each position;
        R ≤ B. Padding is at the left; there all tensors are 0.
    """
    attended = batch["attention_mask"].bool()
    together = first_fit(attended.sum(-1).tolist(), size)
    row = torch.arange(len(attended))[:, None].expand_as(attended)
    documents = batch.get("document", torch.zeros_like(row))
    whole = {**batch, "packed_row": row, "document": row * (documents.max() + 1) + documents}
    places = attended.flatten().nonzero().squeeze(-1).split(attended.sum(-1).tolist())
    index = pad_sequence(
        [torch.cat([places[row] for row in rows]) for rows in together],
        batch_first=True,
        padding_value=-1,
        padding_side="left",
    )
    if index.numel() >= attended.numel():
        return batch

    def packed(tensor: Tensor) -> Tensor:
        if tensor.shape[:2] != attended.shape:
            return tensor
        taken = tensor.flatten(0, 1)[index]
        return taken.masked_fill((index < 0).view(*index.shape, *[1] * (tensor.ndim - 2)), 0)

    batch = {name: packed(tensor) for name, tensor in whole.items()}
    first = batch["document"].gather(1, (index >= 0).int().argmax(-1, keepdim=True))
    batch["document"] = torch.where(index < 0, first, batch["document"])  # a query that sees nothing may be NaN
    return batch


def first_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Rows that are packed together, by first-fit decreasing."""
    together: list[list[int]] = []
    free: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((place for place, room in enumerate(free) if lengths[row] <= room), len(free))
        if place == len(free):
            together.append([])
            free.append(max(size, lengths[row]))
        together[place].append(row)
        free[place] -= lengths[row]
    return together


def row_lengths(batch: Batch) -> Tensor:
    """Attended tokens of each row, or of each document of a batch that has them."""
    attended = batch["attention_mask"].bool()
    if "document" not in batch:
        return attended.sum(-1)
    row = torch.arange(len(attended))[:, None].expand_as(attended)
    return torch.stack([row, batch["document"]], dim=-1)[attended].unique(dim=0, return_counts=True)[1]


def single_rows(batch: Batch) -> list[Batch]:
    """Batches of one row each, without padding if the rows were packed."""
    rows = range(len(batch["sample_index"]))
    if (packed_row := batch.get("packed_row")) is None:
        return [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in rows]

    def only(tensor: Tensor, row: int) -> Tensor:
        if tensor.shape[:2] != packed_row.shape:
            return tensor[row : row + 1]
        place, columns = ((packed_row == row) & batch["attention_mask"].bool()).nonzero(as_tuple=True)
        own = tensor[place, columns]
        return (own[:, columns] if tensor.shape[1:] == packed_row.shape[1:] * 2 else own)[None]  # pairs [R, W, W]

    return [{name: only(tensor, row) for name, tensor in batch.items() if name != "packed_row"} for row in rows]
