"""Load, build, check and save tokenizers, and set their chat templates."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from data.errors import nearest
from diffllm.checkpoint_errors import readable
from diffllm.checkpoint_source import on_hub
from diffllm.gguf import split_gguf

MASK_TOKEN = "<|mask|>"
THINKING = ("<think>", "</think>")
WHOLE_IN_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes of tokenizers that tokenizer.json describes
WORDS = ("system", "user", "assistant", "Solve")
# By name. Gemma has no system role: its template puts the system message before the first turn.
CHAT_TEMPLATES = {
    file.stem: file.read_text(encoding="utf-8").removesuffix("\n")
    for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}
# Variables of chat templates that Transformers sets, beside the special tokens.
OF_TRANSFORMERS = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}


def builtin_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, whole numbers up to 999, a few words and the special tokens.

    It has the ChatML template. End of sequence and padding are `<|endoftext|>`, the mask is `<|mask|>`.
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
    tokenizer.add_tokens(list(THINKING))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token=MASK_TOKEN,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATES["chatml"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer, without remote code.

    Raises:
        ValueError: the tokenizer is missing, cannot be read, or needs remote code.
    """
    source = os.path.expanduser(path_or_name)
    directory, file = split_gguf(source)
    with readable(source, "the tokenizer"):
        try:
            declared = None if file else get_tokenizer_config(directory).get("tokenizer_class")
            # Transformers 5 would replace a tokenizer of its own class by that of some models, such as Qwen2's.
            loader = PreTrainedTokenizerFast if declared in WHOLE_IN_FILE else AutoTokenizer
            tokenizer = loader.from_pretrained(directory, gguf_file=file, padding_side="left", trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ValueError("it is code of the checkpoint's own, and remote code does not run") from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # without files Transformers makes an empty one
        raise ValueError(f"model.path={source}: no tokenizer files")
    tokenizer.name_or_path = source
    return tokenizer


def name_mask(tokenizer: PreTrainedTokenizerBase, mask_token: str) -> bool:
    """Make `mask_token` the tokenizer's mask. Return whether it was added to the vocabulary.

    Raises:
        ValueError: texts or the chat template may contain the token.
    """
    known, special = mask_token in tokenizer.get_vocab(), tokenizer.get_added_vocab()
    template = str(tokenizer.chat_template).replace("bos_token", str(tokenizer.bos_token))
    of_texts = (known and mask_token not in special) or mask_token in THINKING
    if of_texts or mask_token in template:
        used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, *THINKING}
        unused = {token for token in special if token not in template} - used
        raise ValueError(
            f"model.mask_token={mask_token}: {'a text' if of_texts else 'the chat template'} may contain "
            f"it; name an unused special token ({', '.join(sorted(unused)) or 'none'}), or a new one"
        )
    if not known and re.search(r"[\s=]", mask_token):
        raise ValueError(f"model.mask_token={mask_token}: a new token has no spaces and no =; {MASK_TOKEN} will do")
    tokenizer.add_special_tokens({"mask_token": mask_token})
    return not known


def name_own_mask(tokenizer: PreTrainedTokenizerBase, mask_token_id: int) -> None:
    """Let the tokenizer of a diffusion checkpoint that does not name its mask name it."""
    if tokenizer.mask_token is None:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask_token_id)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Set the chat template by a name of `CHAT_TEMPLATES`, or from a .jinja file.

    Raises:
        ValueError: no such file, or the vocabulary lacks a token of the named template.
    """
    if template not in CHAT_TEMPLATES:
        if not Path(template).is_file():
            raise ValueError(
                f"model.chat_template={template}: no such file; give the path of a .jinja file, or one of "
                f"{', '.join(CHAT_TEMPLATES)}"
            )
        tokenizer.chat_template = Path(template).read_text()
        return
    text = CHAT_TEMPLATES[template]
    if missing := set(re.findall(r"<\|?\w+\|?>", text)) - tokenizer.get_vocab().keys():
        raise ValueError(
            f"model.chat_template={template}: the tokenizer has no {', '.join(sorted(missing))}; choose another "
            "template, or null for the tokenizer's own"
        )
    tokenizer.chat_template = text


def set_template_variables(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> None:
    """Set defaults for variables of the chat template, such as `enable_thinking`.

    They become part of the template, also in an exported tokenizer.

    Raises:
        ValueError: no template, an unknown variable, or a value that Jinja cannot write.
    """
    if not values:
        return
    if tokenizer.chat_template is None:
        raise ValueError(
            f"model.chat_template_kwargs={dict(values)}: the tokenizer has no chat template; name one by "
            "model.chat_template"
        )
    taken = template_variables(tokenizer.get_chat_template()) - {*tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    for name in values:
        if name not in taken:
            hint = nearest(name, sorted(taken)) if taken else "it takes nothing but the messages"
            raise ValueError(f"model.chat_template_kwargs={dict(values)}: the chat template takes no {name!r}; {hint}")
    # trim_blocks drops the last newline, so the template still begins at the start of a line.
    defaults = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in values.items()
    )
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {name: defaults + text for name, text in tokenizer.chat_template.items()}
    else:
        tokenizer.chat_template = defaults + tokenizer.chat_template


class _Generation(Extension):
    """Parses `{% generation %}…{% endgeneration %}`, which marks answers for Transformers."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_variables(template: str) -> set[str]:
    """Variables of a chat template that Transformers does not set.

    Raises:
        ValueError: the template is not valid Jinja.
    """
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        return meta.find_undeclared_variables(environment.parse(template)) - OF_TRANSFORMERS
    except TemplateError as error:
        raise ValueError(f"the chat template cannot be read: {' '.join(str(error).split())}") from error


def _literal(value: Any) -> str:
    """A value as a Jinja literal.

    Raises:
        ValueError: a number that is not finite, or a type that JSON lacks.
    """
    match value:
        case None | True | False:
            return str(value).lower()
        case str() | int():
            return repr(value)
        case float() if math.isfinite(value):
            return repr(value)
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case dict():
            return f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in value.items())}}}"
    raise ValueError(f"model.chat_template_kwargs: {value!r} cannot be written in a chat template")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Write the tokenizer so that Transformers 4, which the published code needs, can read it."""
    tokenizer.save_pretrained(directory)
    path = Path(directory) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if "auto_map" in config and not Path(tokenizer.name_or_path).is_dir():
        config["auto_map"] = on_hub(config["auto_map"], tokenizer.name_or_path)
    if config.get("tokenizer_class") == "DreamTokenizer":
        if "auto_map" in config:  # the published class reads these
            tokenizer.backend_tokenizer.model.save(str(directory))
            added = tokenizer.added_tokens_decoder.items()
            config["added_tokens_decoder"] = {id: token.__getstate__() for id, token in added}
        else:
            config["tokenizer_class"] = "Qwen2Tokenizer"
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["chat_template"] = tokenizer.chat_template  # Transformers 4 may not read a separate file
    for name in ("backend", "is_local", "local_files_only"):  # settings of this load
        config.pop(name, None)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None, vocab_size: int | None = None
) -> None:
    """Refuse a tokenizer that cannot serve a diffusion model.

    Raises:
        ValueError: no mask or end-of-sequence token; a mask that differs from the model's, or is also padding or end;
            or more tokens than the model's vocabulary.
    """
    name = tokenizer.name_or_path or "built-in"
    if mask_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no mask token: add one with tokenizer.add_special_tokens")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no end-of-sequence token: set tokenizer.eos_token")
    if tokenizer.mask_token_id not in (None, mask_token_id):
        raise ValueError(
            f"tokenizer {name!r} has the mask {tokenizer.mask_token!r}, token {tokenizer.mask_token_id}, but the model "
            f"has token {mask_token_id}: set mask_token in tokenizer_config.json"
        )
    if mask_token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        raise ValueError(
            f"tokenizer {name!r} uses token {mask_token_id} as mask and as padding or end: they must differ"
        )
    if vocab_size is not None and vocab_size < len(tokenizer):
        raise ValueError(
            f"model vocabulary {vocab_size} is smaller than the {len(tokenizer)} tokens of tokenizer {name!r}: "
            "ids beyond it would have no embedding"
        )
