"""How runs start: the command line, sampling and evaluation from it, local and cluster launchers.

The root scripts import this package first. It makes sure that the others are those beside it: their names are common.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def foreign_package(root: Path) -> str | None:
    """What is wrong if a package would be imported from elsewhere than `root`; both places are named."""
    for package in ("data", "diffllm", "sampling", "trainer"):
        spec = importlib.util.find_spec(package)
        place = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if place != root / package:
            return f"package '{package}' would come from {place}, expected {root / package}"
    return None


if problem := foreign_package(ROOT):
    sys.exit(f"error: {problem}")

import data.terminal  # noqa: E402, F401 — before all that takes seconds to import
