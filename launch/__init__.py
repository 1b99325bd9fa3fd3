"""The command line, sampling and evaluation by it, planning, sweeps, local and cluster launchers.

Raises:
    ImportError: a package of another project would be imported in place of `data`, `diffllm`, `sampling` or `trainer`.
"""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"

for name in ("data", "diffllm", "sampling", "trainer"):
    spec = find_spec(name)
    place = Path(spec.origin).resolve().parent if spec and spec.origin else None
    if place != ROOT / name:
        raise ImportError(f"package '{name}' would come from {place}, expected {ROOT / name}")

import data.terminal  # noqa: E402, F401 — before imports that take seconds
