"""The house: imports point one way, and every setting is read."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from trainer.config import Config, field_names

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
    ours = {name.split(".")[0] for name in names} & MAY_IMPORT.keys()
    assert ours <= MAY_IMPORT[package] | {package}
    for library in FORBIDDEN_LIBRARIES.get(package, ()):
        assert not any(name == library or name.startswith(library + ".") for name in names)


def test_every_setting_is_read():
    """Some code outside the checks of its own dataclass reads it as an attribute, or by its name in a string."""
    text = "\n".join(path.read_text() for path in [*SOURCES, *ROOT.glob("*.py")] if path.name != "config.py")
    text += "\n".join(
        re.sub(r"@dataclass.*?(?=\n\n\n[^ ])", "", path.read_text(), flags=re.S)
        for path in SOURCES
        if path.name == "config.py"
    )
    leaves = [name for name in field_names(Config) if "." in name or name in ("seed", "prompt", "input", "output")]
    unread = [name for name in leaves if not re.search(rf"\.{name.rpartition('.')[2]}\b", text)]
    assert unread == []
