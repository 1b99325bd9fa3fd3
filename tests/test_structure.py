"""The house: imports point one way and close no circle, and every setting is read."""

import ast
import itertools
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from diffllm.diffusion import OBJECTIVES
from tests.conftest import ROOT
from trainer.config import Config
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


GROUPS = {item.type.__name__: item.name for item in fields(Config) if is_dataclass(item.type)}
GROUPS |= {objective.settings.__name__: "diffusion" for objective in OBJECTIVES.values()}


class Reads:
    """Finds `config.group.field` reads: expressions are typed by annotations, constructors and assignments.

    Attributes:
        found: names of the settings that are read outside the checks of their own dataclass.
    """

    def __init__(self, sources: Iterable[str]):
        trees = [ast.parse(source) for source in sources]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        self.classes = {node.name: {} for node in nodes if isinstance(node, ast.ClassDef)}
        self.bases = {node.name: [*map(ast.unparse, node.bases)] for node in nodes if isinstance(node, ast.ClassDef)}
        self.returned = {node.name: self.annotated(node.returns) for node in nodes if isinstance(node, ast.FunctionDef)}
        self.found: set[str] = set()
        for _ in range(2):  # the second pass knows the attributes of all classes
            for tree in trees:
                self.visit(tree, {}, None)

    def annotated(self, annotation: ast.AST | None) -> str | None:
        names = re.findall(r"\w+", ast.unparse(annotation)) if annotation else []
        return next((name for name in names if name in self.classes), None)

    def visit(self, node: ast.AST, scope: dict[str, str | None], owner: str | None) -> None:
        if isinstance(node, ast.FunctionDef):
            if node.name == "__post_init__" and owner in (*GROUPS, "Config"):
                return
            arguments = (*node.args.args, *node.args.kwonlyargs)
            scope = scope | {arg.arg: self.annotated(arg.annotation) for arg in arguments}
            scope |= {"self": owner, "cls": owner}
        elif isinstance(node, ast.ClassDef):
            owner = node.name
        for child in ast.iter_child_nodes(node):
            self.visit(child, scope, owner)
        if isinstance(node, ast.Attribute):
            self.type_of(node, scope)
        elif isinstance(node, ast.AnnAssign):
            where = self.classes[owner] if owner and not isinstance(node.target, ast.Attribute) else scope
            where[ast.unparse(node.target)] = self.annotated(node.annotation)
        elif isinstance(node, ast.Assign):
            self.assign(node.targets[0], node.value, scope)

    def assign(self, target: ast.AST, value: ast.AST, scope: dict[str, str | None]) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for each, its in zip(target.elts, value.elts, strict=True):
                self.assign(each, its, scope)
        elif isinstance(target, ast.Name):
            scope[target.id] = self.type_of(value, scope)
        elif isinstance(target, ast.Attribute) and (owner := self.type_of(target.value, scope)):
            self.classes[owner].setdefault(target.attr, self.type_of(value, scope))

    def type_of(self, node: ast.AST, scope: dict[str, str | None]) -> str | None:
        if isinstance(node, ast.Name):
            return scope.get(node.id)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            first = self.type_of(node.args[0], scope) if node.args else None
            return name if name in self.classes else first if name == "replace" else self.returned.get(name)
        if not isinstance(node, ast.Attribute) or (owner := self.type_of(node.value, scope)) is None:
            return None
        if owner in (*GROUPS, "Config") and isinstance(node.ctx, ast.Load):
            self.found.add(f"{GROUPS[owner]}.{node.attr}" if owner in GROUPS else node.attr)
        return next((each[node.attr] for each in map(self.classes.get, self.lineage(owner)) if node.attr in each), None)

    def lineage(self, name: str) -> list[str]:
        """A class of the sources, and the classes of the sources that it inherits from."""
        bases = [base for base in self.bases[name] if base in self.classes]
        return [name, *itertools.chain(*map(self.lineage, bases))]


def unread(sources: Iterable[str]) -> set[str]:
    return {name for name in field_names() if name not in GROUPS.values()} - Reads(sources).found


def test_every_setting_is_read():
    texts = [path.read_text() for path in [*SOURCES, *ROOT.glob("*.py")]]
    assert unread(texts) == set()


@pytest.mark.parametrize(
    ("readers", "setting"),
    [
        (("diffllm", "trainer"), "diffusion.eps"),
        (("sampling",), "sampling.eps"),
        (("sampling", "trainer", "launch"), "sampling.steps"),
        (("trainer", "launch"), "optim.name"),
    ],
)
def test_a_setting_that_nothing_reads_is_found(readers, setting):
    """Although other objects, and other groups, have an attribute of the same name."""
    texts, attribute = [], rf"\.{setting.partition('.')[2]}\b"
    for path in SOURCES:
        text = path.read_text()
        texts.append(re.sub(attribute, ".other", text) if path.relative_to(ROOT).parts[0] in readers else text)
    assert any(re.search(attribute, text) for text in texts)
    assert unread(texts) - {"mode", "task.name", "task.files"} == {setting}  # roots and launch read these
