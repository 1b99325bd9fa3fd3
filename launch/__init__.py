"""How runs start: the command line, sampling and evaluation from it, local and cluster launchers.

Raises:
    ImportError: another project's package of the same name as one beside this one would be imported: the names are
        common ones.
"""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

for name in ("data", "diffllm", "sampling", "trainer"):
    spec = find_spec(name)
    place = Path(spec.origin).resolve().parent if spec and spec.origin else None
    if place != ROOT / name:
        raise ImportError(f"package '{name}' would come from {place}, expected {ROOT / name}")

import data.terminal  # noqa: E402, F401 — before all that takes seconds to import
