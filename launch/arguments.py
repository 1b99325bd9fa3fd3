"""The arguments of a command line: checked before Hydra composes them, with errors that name the nearest known one."""

import os
import re
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException

from data.errors import nearest, twice
from data.terminal import print_stderr
from diffllm.diffusion import OBJECTIVES
from launch import CONF
from trainer.distributed import ranks_from_environment
from trainer.schema import field_names

# Names in Transformers, TRL and axolotl that have little in common with ours.
OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "num_train_epochs": "trainer.total_epochs",
    "num_epochs": "trainer.total_epochs",
    "per_device_train_batch_size": "data.micro_batch_size_per_gpu",
    "micro_batch_size": "data.micro_batch_size_per_gpu",
    "gradient_checkpointing": "model.enable_gradient_checkpointing",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "eval_steps": "trainer.val_check_interval",
    "save_steps": "trainer.save_checkpoint_steps",
    "early_stopping_patience": "trainer.patience",
    "load_in_4bit": "model.quantize",
    "adapter_name_or_path": "model.adapter",
    "report_to": "trainer.logger",
    "model_name_or_path": "model.path",
}
FREE = ("model.chat_template_kwargs", "task.files")  # their keys are those of a template, and names of tasks


def quote_text(argument: str) -> str:
    """Quote texts such as that of `prompt=…`, which Hydra's grammar would parse."""
    name, _, text = argument.partition("=")
    if name not in ("prompt", "template", "model.mask_token") or text == "null":
        return argument
    if name == "model.mask_token" and re.fullmatch(r"(['\"]).*\1", text):  # Hydra quoted it for a job of a sweep
        return argument
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation: OmegaConf halves backslashes before ${
    text = re.sub(r'(\\*)("|\Z)', lambda end: 2 * end[1] + (end[2] and '\\"'), text)  # and Hydra those before quotes
    return f'{name}="{text}"'


def check_arguments(arguments: list[str]) -> None:
    """Refuse unknown groups, choices and settings, and name the nearest known one.

    Raises:
        ValueError: an unknown name, an argument that cannot be read, a value or a setting with several values given
            twice, a sweep started by torchrun, or see `group_choices`.
    """
    if {"-m", "--multirun"} & set(arguments):
        refuse_ranks()
    directory, arguments = split_config_dir(arguments)
    choices = group_choices(directory)
    names = sorted({*choices, *field_names()})
    given = Counter(argument.partition("=")[0].lstrip("+") for argument in arguments)
    for argument in arguments:
        if groups := sorted(group for group in choices if argument in choices[group]):
            meant = " or ".join(f"{group}={argument}" for group in groups)
            raise ValueError(f"{argument}: write choices as GROUP=CHOICE; did you mean {meant}?")
        if argument.startswith("-") or "=" not in argument:
            continue
        override = _parse(argument)
        key = override.key_or_group
        if override.is_discrete_sweep():
            _check_values(argument, override, given[key])
        if key in ("hydra/launcher", "hydra/sweeper"):
            check_plugin(key, override.get_value_string())
        if re.split(r"[./]", key)[0] == "hydra" or key.rpartition(".")[0] in FREE:
            continue
        if key not in names:
            raise _unknown(argument, override, names, choices)
        if key in choices:
            _check_choices(argument, override, choices[key])


def _parse(argument: str) -> Override:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise ValueError(
            f"{argument}: cannot be read as NAME=VALUE, {str(error).splitlines()[0]}. Put a value with signs or spaces "
            "in double quotes, and once more for the shell: 'NAME=\"VALUE\"'"
        ) from error


def _check_values(argument: str, override: Override, count: int) -> None:
    """Refuse values that are given twice.

    Args:
        count: arguments with the same name.
    """
    if count > 1:
        raise ValueError(f"{argument}: {override.key_or_group} is given twice; give all its values at once")
    if len({*(values := [*override.sweep_string_iterator()])}) < len(values):
        raise ValueError(f"{argument}: {twice(values)}")


def _unknown(
    argument: str, override: Override, names: Sequence[str], choices: Mapping[str, Sequence[str]]
) -> ValueError:
    key = override.key_or_group
    ours, (group, _, folder) = OTHER_NAMES.get(re.split(r"[./]", key)[-1]), key.partition("/")
    if group in choices and folder:  # as the help of Hydra lists the choices in folders
        ours = f"{group}={folder}/{override.get_value_string()}"
    return ValueError(f"{argument}: no such setting; {f'did you mean {ours}?' if ours else nearest(key, names)}")


def _check_choices(argument: str, override: Override, choices: Sequence[str]) -> None:
    key = override.key_or_group
    values = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_string()]
    if key == "experiment":  # several may be joined: [dream_s1k_80gb,quick]
        values = [name.strip() for value in values for name in value.strip("[]").split(",")]
    for value in task_choices(argument) or values:
        if value not in choices:
            raise ValueError(f"{key}={value}: no such choice; {nearest(value, choices)}")


def name_tasks(arguments: Sequence[str]) -> list[str]:
    """Add `task.name=[A,B]` after `task=[A,B]`: Hydra merges the files of both choices, and the last name would win."""
    named = [(argument, task_choices(argument)) for argument in arguments]
    return [
        each
        for argument, names in named
        for each in ([argument, f"task.name=[{','.join(names)}]"] if names else [argument])
    ]


def task_choices(argument: str) -> list[str]:
    """Choices of an argument such as `task=[A,B]`; empty for other arguments."""
    found = re.fullmatch(r"task=\[([^\[\]]*)\]", argument)
    return [name.strip() for name in found[1].split(",")] if found else []


def refuse_ranks() -> None:
    """Refuse a sweep under torchrun.

    Raises:
        ValueError: there are several ranks.
    """
    if ranks_from_environment()[1] > 1:
        raise ValueError("start a sweep by `python train.py …`: under torchrun its ranks would choose different jobs")


def refuse_directory(overrides: Sequence[str]) -> None:
    """Refuse an output directory of a sweep, each of whose jobs has its own.

    Raises:
        ValueError: it is given.
    """
    for override in overrides:
        if override.startswith("trainer.output_dir="):
            raise ValueError(f"{override}: a sweep's jobs would share it; name the sweep's by hydra.sweep.dir=DIR")


def warn_of_unread(command: str, arguments: Sequence[str], reads: Sequence[str]) -> None:
    """Name the groups and settings of a command line that a command does not read. Experiments may hold such ones."""

    def within(name: str, group: str) -> bool:
        return name == group or name.startswith((f"{group}.", f"{group}/"))

    given = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    keys, known = [re.split("[=@]", argument.lstrip("+~"))[0] for argument in given], ("experiment", "hydra", *reads)
    unread = [key for key in keys if not any(within(key, name) or within(name, key) for name in known)]
    if unread and os.environ.get("RANK", "0") == "0":
        print_stderr(f"warning: {command} does not read {', '.join(unread)}")


def split_config_dir(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The directory of a command line's `--config-dir`, and the other arguments.

    Raises:
        ValueError: it does not exist.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    known, others = parser.parse_known_args(arguments)
    directory = known.config_dir
    if directory is not None and not directory.is_dir():
        raise ValueError(f"--config-dir {directory}: no such directory; it holds choices such as experiment/mine.yaml")
    return directory, others


def group_choices(directory: Path | None = None) -> dict[str, list[str]]:
    """Choices of each group: files of conf/ and of another directory, in folders too, and the objectives.

    Raises:
        ValueError: a file has the name of an objective. Its `defaults` would include itself.
    """
    groups = [group.name for group in CONF.iterdir() if group.is_dir()]
    for own in directory.rglob("*.yaml") if directory else ():
        if (CONF / (name := own.relative_to(directory))).exists():
            raise ValueError(f"{own}: would be ignored, as conf/{name} has its name; give it another")
    folders = [CONF, *filter(None, [directory])]
    choices = {
        name: [
            file.relative_to(folder / name).with_suffix("").as_posix()
            for folder in folders
            for file in sorted((folder / name).rglob("*.yaml"))
        ]
        for name in groups
    }
    if taken := [name for name in choices["diffusion"] if name in OBJECTIVES]:
        raise ValueError(
            f"conf/diffusion/{taken[0]}.yaml: diffusion={taken[0]} is the objective with its defaults; give the file "
            f"another name, and begin it with `defaults: [{taken[0]}]`"
        )
    return choices | {"diffusion": [*choices["diffusion"], *OBJECTIVES]}


def check_plugin(group: str, name: str) -> None:
    """Refuse a launcher or sweeper that is not installed."""
    Plugins.instance()  # registers installed plugins
    installed = [file.removesuffix(".yaml") for file in ConfigStore.instance().list(group) if file.endswith(".yaml")]
    if name not in installed:
        raise ValueError(
            f"{group}={name}: not among {', '.join(installed)}; pip install 'diffllm[sweep]' adds the launchers "
            "joblib, submitit_local and submitit_slurm and the sweeper optuna"
        )
