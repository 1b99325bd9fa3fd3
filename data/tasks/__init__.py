"""Tasks, one file each, chosen by name."""

from importlib import import_module
from pkgutil import iter_modules

from data.config import DataConfig, TaskConfig
from data.errors import nearest, twice
from data.tasks.base import Task


def tasks_of(config: DataConfig, settings: TaskConfig, default: str = "equations") -> list[Task]:
    """Return the tasks of the settings, or the default.

    Raises:
        ValueError: a task is given twice; `task.files` names another one, or one without files; or see `find_task`.
    """
    names = settings.name or [default]
    if len({*names}) < len(names):
        raise ValueError(f"task.name={names}: {twice(names)}")
    for name in settings.files.keys() - {*names}:
        raise ValueError(f"task.files.{name}: not among the tasks of this run; {nearest(name, names)}")
    tasks = [find_task(name)(config, settings) for name in names]
    for task in tasks:
        if task.name in settings.files and not task.reads_files:
            raise ValueError(
                f"task.files.{task.name}={settings.files[task.name]}: this task reads no file; to score rows of your "
                "own choose task=rows and name them in data.val_files"
            )
    return tasks


def find_task(name: str) -> type[Task]:
    """Return the task with this name.

    Raises:
        ValueError: no module of this package defines it, or two tasks have one name.
    """
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    types = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    tasks = [each for each in types if issubclass(each, Task) and "name" in vars(each)]
    by_name = {each.name: each for each in tasks}
    if len(by_name) < len(tasks):
        raise ValueError(f"data/tasks: task name {twice(each.name for each in tasks)}")
    if name not in by_name:
        raise ValueError(f"task.name={name}: no such task; {nearest(name, sorted(by_name))}")
    return by_name[name]
