"""Tasks: questions and how their answers are scored. A task is one file of this package, chosen by its name."""

import difflib
from importlib import import_module
from pkgutil import iter_modules

from data.tasks.base import Task


def find_task(name: str) -> type[Task]:
    """Return the task with this name.

    Raises:
        ValueError: no module of this package defines it.
    """
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    types = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    tasks = {each.name: each for each in types if issubclass(each, Task) and "name" in vars(each)}
    if name not in tasks:
        close = difflib.get_close_matches(name, tasks, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"task.name={name}: no such task; {hint}Choose one of {', '.join(sorted(tasks))}")
    return tasks[name]
