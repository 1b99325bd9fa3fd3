"""Recognise and check GGUF files, and find weights that Transformers would drop."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from data.storage import refuse_pointer

PACKAGES = ("gguf", "accelerate")
ROPE_WEIGHTS = ("rope_freqs", "rope_factors")  # weights that scale rotary frequencies


class Header(NamedTuple):
    """Metadata of a GGUF file, and the names of its tensors."""

    architecture: str
    parts: int | None  # number of files of the model; None for one
    rope_scaling: str | None
    tensors: list[str]


def is_gguf(name: str) -> bool:
    """Whether the name ends in .gguf."""
    return Path(name).suffix.lower() == ".gguf"


def split_gguf(name: str) -> tuple[str, str | None]:
    """Arguments of `from_pretrained`: directory or hub id, and `gguf_file` or None."""
    path = Path(name)
    return (str(path.parent), path.name) if is_gguf(name) else (name, None)


def check_gguf(name: str) -> None:
    """Refuse a GGUF file before it is read.

    Raises:
        ValueError: it does not exist, is a git-lfs pointer, or needs a package that is not installed.
    """
    if not Path(name).is_file():
        raise ValueError(f"model.path={name}: no such file")
    refuse_pointer(Path(name))
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise ValueError(f"model.path={name}: reading it needs {', '.join(missing)}: pip install 'diffllm[gguf]'")


def read_header(name: str) -> Header:
    """Header of a GGUF file; a broken one raises errors of many types."""
    import gguf  # an extra

    reader = gguf.GGUFReader(name)
    architecture = reader.get_field("general.architecture").contents()
    fields = map(reader.get_field, ("split.count", f"{architecture}.rope.scaling.type"))
    parts, scaling = (field and field.contents() for field in fields)
    return Header(architecture, parts, scaling, [tensor.name for tensor in reader.tensors])


def unknown_tensors(header: Header, name: str) -> list[str]:
    """Weights that the architecture lacks; Transformers would drop them without an error.

    Raises:
        ValueError: the file is a part of a model, or scales rotary frequencies, which Transformers ignores.
    """
    import gguf

    if header.parts and header.parts > 1:
        raise ValueError(
            f"model.path={name}: one of the {header.parts} files of a model; `gguf-split --merge` joins them"
        )
    scaled = [tensor for tensor in header.tensors if tensor.startswith(ROPE_WEIGHTS)]
    if header.rope_scaling not in (None, "none"):
        scaled.append(f"rope.scaling.type={header.rope_scaling}")
    if scaled:
        raise ValueError(
            f"model.path={name}: its rotary frequencies are scaled ({', '.join(scaled)}), which Transformers does "
            "not read from GGUF; give the safetensors checkpoint"
        )
    architectures = {title: architecture for architecture, title in gguf.MODEL_ARCH_NAMES.items()}
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[architectures[header.architecture]]}

    def plain(tensor: str) -> str:
        return re.sub(r"\.(weight|bias)$", "", re.sub(r"^blk\.\d+", "blk.{bid}", tensor))

    return [tensor for tensor in header.tensors if plain(tensor) not in known]
