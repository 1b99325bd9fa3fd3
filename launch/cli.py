"""The command line of the root scripts: Hydra composes, `resolve` checks, a function runs."""

import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path

import hydra
from huggingface_hub.utils import logging as hub_logging
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers.utils import logging as transformers_logging
from yaml import YAMLError

from data.storage import find_full_disk, first_line
from data.terminal import STOPPED, print_stderr, printable, running
from diffllm.diffusion import OBJECTIVES
from launch import CONF
from launch.arguments import (
    FREE,
    check_arguments,
    group_choices,
    name_tasks,
    quote_text,
    refuse_directory,
    refuse_ranks,
    split_config_dir,
    warn_of_unread,
)
from launch.help import help_text
from launch.recommended import resolve_recommended
from launch.sweep import Sweep, recorded, reported
from trainer.config import Config
from trainer.distributed import ranks_from_environment
from trainer.ending import SPEAK_SECONDS, Deadline, FirstError, leave, report_to_torchrun

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
