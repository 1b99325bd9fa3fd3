"""Cut the rows of a batch to their widths, and pad them.

The width of a row is the number of its positions after the prompt. The response fills the first positions,
end-of-sequence tokens the rest. The model attends to these tokens and is trained on them, so that it learns to stop. A
negative width cuts into the prompt.
"""

import numpy as np

from data.config import DataConfig
from data.token_rows import TokenRows


def response_widths(
    prompt_lengths: np.ndarray, response_lengths: np.ndarray, config: DataConfig, rng: np.random.Generator
) -> np.ndarray:
    """Draw the per-batch cutoff of one global batch.

    `min_pad` drops the columns that are padding in every row · `random` ends all rows at the length of one drawn row ·
    `random_with_input_pad` gives all rows the response length of one drawn row, with prompts padded on the left ·
    without a cutoff all rows end at `max_length`. No row exceeds `max_length`. Then, with probability
    `resp_cutoff_ratio`, all rows lose a random tail, but keep at least one response position each. At last rows are
    lengthened to a multiple of `pad_to_multiple`.

    Args:
        prompt_lengths, response_lengths: [B] over the global batch, so that every rank computes the same widths.
        rng: keyed by the step, so that a resumed run draws the same widths.

    Returns:
        [B] widths.
    """
    totals = prompt_lengths + response_lengths
    drawn = rng.integers(len(totals))
    if not config.enable_perbatch_cutoff:
        widths = config.max_length - prompt_lengths
    else:
        widths = {
            "min_pad": totals.max() - prompt_lengths,
            "random": totals[drawn] - prompt_lengths,
            "random_with_input_pad": np.full_like(response_lengths, response_lengths[drawn]),
        }[config.perbatch_cutoff_type]

    widths = np.minimum(widths, config.max_length - prompt_lengths)
    shortest = widths.min()
    if rng.random() < config.resp_cutoff_ratio and shortest > 1:
        widths = widths - rng.integers(1, shortest)
    if config.pad_to_multiple is not None:
        widths = widths + -(prompt_lengths + widths) % config.pad_to_multiple
    return np.minimum(widths, config.max_length - prompt_lengths)


def assemble(rows: TokenRows, samples: np.ndarray, widths: np.ndarray, eos_token_id: int) -> dict[str, np.ndarray]:
    """Cut and pad rows into one batch.

    Args:
        samples: [B] indices into `rows`.
        widths: [B] from `response_widths`.

    Returns:
        input_ids [B, L]; maskable [B, L], the response without its context parts, and without the padding after a
        response that data.truncation cut; attention_mask [B, L], 0 at left padding; position_ids [B, L], counting the
        attended tokens (1 at padding, as in Dream); sample_index [B]; row_tokens [B], the number of tokens without
        padding.
    """
    kept = rows.prompt_lengths[samples] + widths
    L = int(kept.max())
    input_ids = np.full((len(samples), L), eos_token_id, dtype=np.int64)
    columns = np.arange(L)
    first = (L - kept)[:, None]  # [B, 1] column where the row begins
    for row, (sample, length) in enumerate(zip(samples, kept, strict=True)):
        ids = rows.ids(sample)[:length]
        input_ids[row, L - length : L - length + len(ids)] = ids
    attended = columns >= first
    maskable = columns >= first + rows.prompt_lengths[samples][:, None]
    for row, sample in enumerate(samples):
        if rows.cut[sample]:  # its end is unknown: do not teach the model to stop
            maskable[row, first[row, 0] + rows.lengths[sample] :] = False
        for start, end in rows.context(sample) + first[row]:
            maskable[row, start:end] = False
    return {
        "input_ids": input_ids,
        "maskable": maskable,
        "attention_mask": attended.astype(np.int64),
        "position_ids": np.where(attended, columns - first, 1),
        "sample_index": samples,
        "row_tokens": np.minimum(kept, rows.lengths[samples]),
    }
