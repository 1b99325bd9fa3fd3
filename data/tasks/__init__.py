"""Tasks, one file each, chosen by name."""

from importlib import import_module
from pkgutil import iter_modules

from data.errors import nearest
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
        raise ValueError(f"task.name={name}: no such task; {nearest(name, sorted(tasks))}")
    return tasks[name]
