"""Objectives, one file each. The `objective` of its settings names it."""

import importlib
import pkgutil

from diffllm.diffusion.objective import OBJECTIVES, Objective, ObjectiveConfig, build_objective, settings_of

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["OBJECTIVES", "Objective", "ObjectiveConfig", "build_objective", "settings_of"]
