"""Tokenizers: a checkpoint's own, or the built-in one."""

import json
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORDS = ("system", "user", "assistant", "Solve")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def builtin_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, so that any text goes through, plus whole numbers up to 999, a few words and the special tokens.

    ChatML template; end of sequence and padding are `<|endoftext|>`, the mask is `<|mask|>`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = [str(number) for number in range(10, 1000)]
    vocab = {token: id for id, token in enumerate([*alphabet, *numbers, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], ignore_merges=True))
    words = "|".join(map(re.escape, WORDS))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"\d+|{words}|\D"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint; no remote code runs.

    Raises:
        ValueError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_name, padding_side="left")
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path={path_or_name}: no tokenizer can be read there ({error})") from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # what Transformers makes of missing files
        raise ValueError(f"model.path={path_or_name}: no tokenizer files there")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Write the tokenizer so that Transformers 4, which the published code runs under, reads it as well."""
    tokenizer.save_pretrained(directory)
    path = Path(directory) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None, vocab_size: int | None = None
) -> None:
    """Refuse a tokenizer that cannot serve a diffusion model.

    Raises:
        ValueError: no mask or end-of-sequence token, mask and padding are one token, or more tokens than the model's
            vocabulary.
    """
    name = tokenizer.name_or_path or "built-in"
    if mask_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no mask token: add one with tokenizer.add_special_tokens")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no end-of-sequence token: set tokenizer.eos_token")
    if mask_token_id == tokenizer.pad_token_id:
        raise ValueError(f"tokenizer {name!r} uses token {mask_token_id} as mask and as padding: they must differ")
    if vocab_size is not None and vocab_size < len(tokenizer):
        raise ValueError(
            f"model vocabulary {vocab_size} is smaller than the {len(tokenizer)} tokens of tokenizer {name!r}: "
            "ids beyond it would have no embedding"
        )
