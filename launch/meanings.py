"""Meanings of settings: the comments above and beside the fields of the dataclasses that own them."""

import ast
import inspect
import io
import tokenize
from dataclasses import is_dataclass
from textwrap import dedent

EXPERIMENT = "settings of several groups that belong together; several are joined: 'experiment=[dream_s1k_80gb,quick]'"


def meanings(schema: type) -> dict[str, str]:
    """The comment above and beside each field of a dataclass; an empty text without one."""
    found: dict[str, str] = {}
    for owner in reversed([each for each in schema.__mro__ if is_dataclass(each)]):
        source = dedent(inspect.getsource(owner))
        beside, above = _comments(source)
        for node in ast.parse(source).body[0].body:
            if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
                continue
            first = node.lineno
            while first - 1 in above:
                first -= 1
            own = [above.get(line) or beside.get(line, "") for line in range(first, node.end_lineno + 1)]
            name = ast.unparse(node.target)
            found[name] = " ".join(filter(None, own)) or found.get(name, "")
    return found


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line: those beside code, and those alone on their line."""
    beside, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            (beside if token.line[: token.start[1]].strip() else alone)[token.start[0]] = token.string.lstrip("# ")
    return beside, alone
