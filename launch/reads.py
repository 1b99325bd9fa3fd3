"""Find the files that read a setting."""

import ast
import itertools
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

from diffllm.diffusion import OBJECTIVES
from trainer.config import Config

GROUPS = {item.type.__name__: item.name for item in fields(Config) if is_dataclass(item.type)}
GROUPS |= {objective.settings.__name__: "diffusion" for objective in OBJECTIVES.values()}


class Reads:
    """Finds `config.group.field` reads: expressions are typed by annotations, constructors and assignments.

    Args:
        sources: code by the name of its file.

    Attributes:
        found: files that read each setting, outside the checks of its own dataclass.
    """

    def __init__(self, sources: Mapping[str, str]):
        trees = {file: ast.parse(source) for file, source in sources.items()}
        nodes = [node for tree in trees.values() for node in ast.walk(tree)]
        self.classes = {node.name: {} for node in nodes if isinstance(node, ast.ClassDef)}
        self.bases = {node.name: [*map(ast.unparse, node.bases)] for node in nodes if isinstance(node, ast.ClassDef)}
        self.returned = {node.name: self.annotated(node.returns) for node in nodes if isinstance(node, ast.FunctionDef)}
        self.found: dict[str, set[str]] = {}
        for _ in range(2):  # the second pass knows the attributes of all classes
            for self.file, tree in trees.items():
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
            name = f"{GROUPS[owner]}.{node.attr}" if owner in GROUPS else node.attr
            self.found.setdefault(name, set()).add(self.file)
        return next((each[node.attr] for each in map(self.classes.get, self.lineage(owner)) if node.attr in each), None)

    def lineage(self, name: str) -> list[str]:
        """A class of the sources, and the classes of the sources that it inherits from."""
        bases = [base for base in self.bases[name] if base in self.classes]
        return [name, *itertools.chain(*map(self.lineage, bases))]
