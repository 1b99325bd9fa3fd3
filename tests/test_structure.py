"""The house: imports point one way and close no circle, and every setting is read."""

import ast
import re
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from launch.reads import GROUPS, Reads
from tests.conftest import ROOT
from trainer.schema import field_names

MAY_IMPORT = {
    "sampling": set(),
    "data": set(),
    "diffllm": {"data", "sampling"},
    "trainer": {"diffllm", "data", "sampling"},
    "launch": {"trainer", "diffllm", "data", "sampling"},
}
FORBIDDEN_LIBRARIES = {"diffllm": ("hydra", "omegaconf", "torch.distributed"), "sampling": ("hydra", "omegaconf")}
SOURCES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    names = imported(path)
    assert {name.split(".")[0] for name in names} & MAY_IMPORT.keys() <= MAY_IMPORT[package] | {package}
    for library in FORBIDDEN_LIBRARIES.get(package, ()):
        assert not any(name == library or name.startswith(library + ".") for name in names)


def test_no_circle_of_files():
    """A file that imports its own package's `__init__` would close one."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES
    }
    graph = {
        module: {name if name in modules else name.rpartition(".")[0] for name in imported_names(path)} & modules.keys()
        for module, path in modules.items()
    }
    TopologicalSorter({module: others - {module} for module, others in graph.items()}).prepare()


def imported_names(path: Path) -> set[str]:
    """Names that a file imports, each with its module."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return imported(path) | {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}


def unread(sources: Mapping[str, str]) -> set[str]:
    return {name for name in field_names() if name not in GROUPS.values()} - Reads(sources).found.keys()


def test_every_setting_is_read():
    texts = {str(path): path.read_text() for path in [*SOURCES, *ROOT.glob("*.py")]}
    assert unread(texts) == set()


@pytest.mark.parametrize(
    ("readers", "setting"),
    [
        (("diffllm", "trainer"), "diffusion.eps"),
        (("sampling",), "sampling.eps"),
        (("trainer", "launch"), "optim.name"),
    ],
)
def test_a_setting_that_nothing_reads_is_found(readers, setting):
    """Although other objects, and other groups, have an attribute of the same name."""
    texts, attribute = {}, rf"\.{setting.partition('.')[2]}\b"
    for path in SOURCES:
        text = path.read_text()
        hidden = path.relative_to(ROOT).parts[0] in readers
        texts[str(path)] = re.sub(attribute, ".other", text) if hidden else text
    assert any(re.search(attribute, text) for text in texts.values())
    assert unread(texts) - {"mode", "task.name", "task.files"} == {setting}  # roots and launch read these
