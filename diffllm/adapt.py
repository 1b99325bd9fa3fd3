"""Adapt an autoregressive checkpoint to diffusion: `python -m diffllm.adapt Qwen/Qwen2.5-7B qwen_adapted`.

Training and sampling adapt a checkpoint when they load it. Adapt a large one once: every rank would load all of it.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.storage import first_line, whole_directory
from data.terminal import Parser, ending_in_one_line, printable
from diffllm.checkpoint_source import CheckpointSource
from diffllm.families import switch_off_causality
from diffllm.loading import building, load_decoder
from diffllm.modeling_diffllm import DiffLLM
from diffllm.tokenizer import MASK_TOKEN, check_tokenizer, load_tokenizer, name_mask


def needs_adapting(source: str | Path | CheckpointSource) -> bool:
    """Whether a checkpoint is autoregressive: a decoder of Transformers without a mask token, or a GGUF file.

    Raises:
        ValueError: no checkpoint, or an unknown family.
    """
    return CheckpointSource.open(source).is_autoregressive


def adapt(
    source: str | Path | CheckpointSource,
    mask_token: str = MASK_TOKEN,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str = "sdpa",
) -> tuple[DiffLLM, PreTrainedTokenizerBase]:
    """Turn an autoregressive checkpoint into a diffusion language model to be trained (arXiv 2410.17891).

    Every position attends to all others; position i-1 still predicts token i. The mask is an unused token of the
    vocabulary, such as `<|fim_pad|>`, or a new one, whose embedding is the mean of those before it. Padding is the
    tokenizer's, or the end of sequence. `load_model` reads the files of `save_pretrained`.

    Args:
        source: a local directory, a hub id, or a GGUF file.
        dtype: `auto` is the checkpoint's own.

    Raises:
        ValueError: no checkpoint, an unknown family, attention that cannot be bidirectional, a mask token that texts
            or the chat template may contain, or a diffusion model.
    """
    source = CheckpointSource.open(source)
    adapted, tokenizer, added = with_mask(source, mask_token)
    lm = load_decoder(source, dtype, attn_implementation)
    mask = tokenizer.mask_token_id
    if added or mask >= lm.get_input_embeddings().num_embeddings:
        add_row(lm, mask)
    check_decoder(lm, source.name)
    model = DiffLLM(lm, adapted)
    model.set_tokenizer(tokenizer)
    return model, tokenizer


def with_mask(
    source: CheckpointSource, mask_token: str = MASK_TOKEN
) -> tuple[CheckpointSource, PreTrainedTokenizerBase, bool]:
    """Adapted config of an autoregressive checkpoint, its tokenizer, and whether the mask was added to it.

    Raises:
        ValueError: a diffusion model, or an unsuitable mask, end or padding token.
    """
    if not source.is_autoregressive:
        raise ValueError(f"{source.name}: this is a diffusion model already; give it as model.path")
    tokenizer = load_tokenizer(source.name)
    added = name_mask(tokenizer, mask_token)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    mask = tokenizer.mask_token_id
    check_tokenizer(tokenizer, mask)
    with building(source.name):
        rows = source.family.config(source.published).vocab_size
    changed = {
        "mask_token_id": mask,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": max(rows, mask + 1),
    }
    adapted = replace(source, published=source.published | changed)
    adapted.check_ids()
    return adapted, tokenizer, added


@torch.no_grad()
def add_row(lm: PreTrainedModel, token: int) -> None:
    """Set the rows of `token` in embedding and head to the mean of the rows before it; lengthen both if needed."""
    rows = lm.get_input_embeddings().num_embeddings
    if token >= rows:
        lm.resize_token_embeddings(token + 1, mean_resizing=False)
    first = min(token, rows)  # all rows after the old ones are new
    weights = {id(weight): weight for weight in (lm.get_input_embeddings().weight, lm.get_output_embeddings().weight)}
    for weight in weights.values():
        weight[first : token + 1] = weight[:first].float().mean(0).to(weight.dtype)


@torch.no_grad()
def check_decoder(lm: PreTrainedModel, source: str) -> None:
    """Refuse a decoder that stays causal, takes no mask, or changes logits after the head.

    Raises:
        ValueError: training the decoder as a diffusion model would fail, or be wrong in silence.
    """
    name = f"{source}: {type(lm).__name__}"
    decoder, head = lm.get_decoder(), getattr(lm, "lm_head", None)
    if not hasattr(decoder, "layers") or head is None:
        raise ValueError(f"{name} has no `layers` or `lm_head`")
    for layer in decoder.layers:
        parts = list(layer.modules())
        if not any(hasattr(part, "is_causal") for part in parts) or any(
            isinstance(part, torch.nn.Conv1d) for part in parts
        ):
            raise ValueError(f"{name} has layers that are causal without attention")
    attention = lm.config._attn_implementation
    ids = torch.arange(8)[None]
    try:
        lm.set_attn_implementation("sdpa")
        switch_off_causality(lm)
        states = decoder(input_ids=ids).last_hidden_state
        changed = decoder(input_ids=ids.masked_fill(ids == 7, 8)).last_hidden_state
        decoder(input_ids=ids, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
        logits = lm(input_ids=ids).logits
    except Exception as error:  # decoders fail in many ways
        raise ValueError(f"{name} cannot attend in both directions ({first_line(error)})") from error
    if torch.equal(states[0, 0], changed[0, 0]):
        raise ValueError(f"{name} attends to the left only, despite is_causal=false")
    if not torch.equal(logits, F.linear(states, head.weight)):
        raise ValueError(f"{name} scales, caps or shifts its logits, which is not supported")
    lm.set_attn_implementation(attention)


def main(arguments: list[str]) -> None:
    parser = Parser("diffllm.adapt", __doc__)
    parser.add_argument("source", help="a local directory, a hub id or a .gguf file")
    parser.add_argument("directory", help="of the adapted checkpoint, in the dtype of the source")
    parser.add_argument(
        "mask_token", nargs="?", default=MASK_TOKEN, help=f"an unused or new token; default: {MASK_TOKEN}"
    )
    with ending_in_one_line():
        options = parser.parse_args(arguments)
        with whole_directory(options.directory) as unfinished:
            model, tokenizer = adapt(options.source, options.mask_token, dtype="auto")
            model.save_pretrained(unfinished, tokenizer=tokenizer)
        mask = f"its mask is {tokenizer.mask_token}, token {model.mask_token_id}"
        print(printable(f"model: {options.directory}, {mask}"))


if __name__ == "__main__":
    main(sys.argv[1:])
