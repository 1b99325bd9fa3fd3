"""FSDP2 training: optimizer, checkpoints, metrics and the loop."""

import data.terminal  # noqa: F401 — first: see its docstring
