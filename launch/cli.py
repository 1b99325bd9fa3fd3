"""The command line of the root scripts: Hydra composes, `resolve` checks, a function runs."""

import os
import re
import signal
import sys
import time
import traceback
import warnings
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path

import hydra
from huggingface_hub.utils import logging as hub_logging
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers.utils import logging as transformers_logging
from yaml import YAMLError

from data.errors import nearest, twice
from data.storage import find_full_disk, first_line
from data.terminal import STOPPED, print_stderr, printable, running
from diffllm.diffusion import OBJECTIVES
from launch import CONF
from launch.help import help_text
from launch.recommended import resolve_recommended
from launch.sweep import Sweep, recorded, reported
from trainer.config import Config
from trainer.distributed import ranks_from_environment
from trainer.ending import SPEAK_SECONDS, Deadline, FirstError, leave, report_to_torchrun
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
EXPECTED = (ValueError, OSError, MemoryError, FloatingPointError, HydraException, OmegaConfBaseException, YAMLError)


def register_defaults() -> None:
    """Give Hydra the defaults of all groups and objectives.

    They are plain values, not the dataclasses: `resolve` then reports a wrong value the same way, whatever its source.
    """
    store, tree = ConfigStore.instance(), defaults(Config)
    for name in FREE:
        OmegaConf.set_struct(OmegaConf.select(tree, name), False)
    del tree.diffusion  # each choice begins with the defaults of its objective
    store.store("defaults", tree)
    for name, objective in OBJECTIVES.items():
        settings = defaults(objective.settings)
        OmegaConf.set_struct(settings, False)  # settings of another objective are refused by `resolve`
        store.store(name, settings, group="diffusion")


def defaults(schema: type) -> DictConfig:
    """Defaults of a dataclass as plain values."""
    return OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(schema)))


def run_name(overrides: str) -> str:
    """Directory name of a command line, the same on every rank. A long one ends in a hash."""
    if not overrides:
        return "default"
    name = re.sub(r"[^\w.+-]", "-", overrides.replace(",", "__"))  # characters that need no quotes
    return name if len(name) <= 100 else f"{name[:91]}_{sha1(overrides.encode()).hexdigest()[:8]}"


register_defaults()
OmegaConf.register_new_resolver("run_name", run_name)


def entry(
    reads: Sequence[str], run_job: Callable[[bool], float | None] | None = None
) -> Callable[[Callable[[Config], None]], Callable[[], None]]:
    """Make a root script's main function from a function of the resolved configuration.

    A user's mistake ends the process with a message and exit code 1.

    Args:
        reads: groups and settings that the function reads. The command line is warned about others.
        run_job: runs a job of a sweep, with or without tracebacks; by default `job_here`.
    """

    def decorate(run: Callable[[Config], None]) -> Callable[[], None]:
        debug = "HYDRA_FULL_ERROR" in os.environ

        @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
        def composed(config: DictConfig) -> float | None:
            with user_errors(debug):
                if HydraConfig.get().mode != RunMode.MULTIRUN:
                    return run(settings_of(config))
                refuse_ranks()  # an experiment may be a sweep without -m
                refuse_directory(HydraConfig.get().overrides.task)
                return run_job(debug) if run_job else job_here(run, config, debug)

        def main() -> None:
            quiet_libraries()
            Deadline.armed = run.__module__ == "__main__"  # not in a caller's process
            try:
                with Deadline.on_error(), user_errors(debug), reported():
                    script = Path(sys.argv[0]).name
                    directory, others = split_config_dir([*map(quote_text, sys.argv[1:])])
                    if {"-h", "--help"} & set(others):
                        if ranks_from_environment()[0] == 0:
                            text = sys.modules[run.__module__].__doc__
                            print(help_text(text, script, reads, group_choices(directory)))
                        return
                    # Hydra reads no options between settings.
                    others.sort(key=lambda argument: argument not in ("-m", "--multirun"))
                    sys.argv[1:] = [*([f"--config-dir={directory}"] if directory else []), *others]
                    check_arguments(sys.argv[1:])
                    warn_of_unread(script, sys.argv[1:], reads)
                    sys.argv[1:] = name_tasks(sys.argv[1:])
                    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
                    composed()
            except BaseException as error:
                if run.__module__ == "__main__" and Sweep.directory is None:
                    leave(error)
                raise

        return main

    return decorate


def settings_of(config: DictConfig) -> Config:
    """Resolve a composed tree, with the sampling settings that its checkpoint recommends; rank 0 prints them.

    Raises:
        ValueError: see `resolve_recommended`.
    """

    def show(line: str) -> None:
        if ranks_from_environment()[0] == 0:
            print_stderr(line)

    return resolve_recommended(config, HydraConfig.get().overrides.task, show)


def job_here(run: Callable[[Config], None], config: DictConfig, debug: bool) -> None:
    """Run a job of a sweep in this process. An error ends the job, not the sweep."""
    Deadline.armed = False  # it would end the process
    with recorded() as (directory, job):
        config.trainer.output_dir = str(directory)
        try:
            run(settings_of(config))
            job["error"] = None
        except Exception as error:
            expected = isinstance(error, EXPECTED)
            job["error"] = " ".join(describe(error).split()) if expected else first_line(error)
            if debug or not expected:
                traceback.print_exc()


def quiet_libraries() -> None:
    """Switch off the progress bars and warnings of Transformers and the hub. Other warnings take a line."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # without it Hydra shows the hub's attempts


@contextmanager
def user_errors(debug: bool) -> Iterator[None]:
    """End the process with a message and exit code 1 on an expected error, with 130 on Ctrl-C.

    Errors before the process group exists usually hit all ranks. Local rank 0 prints its error at once, the others
    after SPEAK_SECONDS, when torchrun has usually ended them. torchrun repeats the error at the end of its report.
    Debug mode shows the traceback.
    """
    try:
        with running():
            yield
    except KeyboardInterrupt as error:  # its arguments are advice
        if debug:
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(": ".join([STOPPED, *error.args]), file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except EXPECTED as error:
        if debug:
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0" and not FirstError.claimed:
            time.sleep(SPEAK_SECONDS)
        message = describe(error)
        report_to_torchrun(f"error: {message}")
        print("error:", message, file=sys.stderr, flush=True)
        sys.exit(1)
    except Exception:
        report_to_torchrun(traceback.format_exc())
        raise


def describe(error: BaseException) -> str:
    """Message of an expected error, without a traceback. A full disk is named first."""
    ours = type(error) is ValueError  # only our own errors have meaningful lines
    message = printable(str(error).replace("\n", "\n  ") if ours else " ".join(str(error).split()))
    full = find_full_disk(error)
    return f"{full}: {message}" if full and full not in message else message


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
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            raise ValueError(
                f"{argument}: cannot be read as NAME=VALUE, {str(error).splitlines()[0]}. Put a value with signs or "
                "spaces in double quotes, and once more for the shell: 'NAME=\"VALUE\"'"
            ) from error
        key = override.key_or_group
        if override.is_discrete_sweep():
            if given[key] > 1:
                raise ValueError(f"{argument}: {key} is given twice; give all its values at once")
            if len({*(each := [*override.sweep_string_iterator()])}) < len(each):
                raise ValueError(f"{argument}: {twice(each)}")
        if key in ("hydra/launcher", "hydra/sweeper"):
            check_plugin(key, override.get_value_string())
        if re.split(r"[./]", key)[0] == "hydra":
            continue
        if key.rpartition(".")[0] in FREE:
            continue
        if key not in names:
            ours, (group, _, folder) = OTHER_NAMES.get(re.split(r"[./]", key)[-1]), key.partition("/")
            if group in choices and folder:  # as the help of Hydra lists the choices in folders
                ours = f"{group}={folder}/{override.get_value_string()}"
            raise ValueError(f"{argument}: no such setting; {f'did you mean {ours}?' if ours else nearest(key, names)}")
        if key not in choices:
            continue
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_string()]
        if key == "experiment":  # several may be joined: [dream_s1k_80gb,quick]
            values = [name.strip() for value in values for name in value.strip("[]").split(",")]
        for value in task_choices(argument) or values:
            if value not in choices[key]:
                raise ValueError(f"{key}={value}: no such choice; {nearest(value, choices[key])}")


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
