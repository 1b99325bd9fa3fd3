"""Run an experiment and summarise it: `python -m launch.experiments ar_vs_diffusion quickstart`.

Starts train.py with a recipe, the experiment NAME and further settings. Then scores, compares and draws the jobs, as
`launch.experiments.sweep` does. Everything goes into a new directory in multirun/.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from data.terminal import Parser, ending_in_one_line, printable
from launch import ROOT
from launch.arguments import check_arguments, quote_text, task_choices
from launch.experiments.sweep import add_options, check_options, summarise

# Options of the summary by the names of the experiments that need some.
SWEEPS = {
    "quick": {"evaluate": True},
    "ablate_data": {"evaluate": True},
    "ablate_equations": {"evaluate": True},
    "ar_vs_diffusion": {"evaluate": True},
    "repeat_data": {"curves": True},
}


def main(arguments: list[str]) -> None:
    parser = Parser("launch.experiments", __doc__)
    parser.add_argument("name", metavar="NAME", help="a choice of conf/experiment, such as sweep_lr")
    parser.add_argument("recipe", metavar="RECIPE", help="another, such as quickstart")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="of train.py; several values are compared")
    parser.add_argument("--config-dir", metavar="DIR", help="has choices of your own, such as experiment/mine.yaml")
    add_options(parser)
    with ending_in_one_line():
        options = parser.parse_intermixed_args(arguments)
        vars(options).update(SWEEPS.get(options.name, {}))
        own = [f"--config-dir={options.config_dir}"] if options.config_dir else []
        settings = [f"experiment=[{options.recipe},{options.name}]", *options.settings]
        check_options(options)
        check_arguments([*own, *map(quote_text, settings)])
        if options.evaluate and not options.metric:
            _check_one_task(options.settings)
        directory = Path("multirun", f"{options.name}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
        sweep = [*own, "-m", settings[0], f"hydra.sweep.dir={directory}", *options.settings]
        code = subprocess.run([sys.executable, ROOT / "train.py", *sweep]).returncode
        if code > 1 or not directory.exists():  # 1: a job failed
            sys.exit(code)
        command = f"python -m launch.experiments {shlex.join([*own, options.name, options.recipe, *options.settings])}"
        print(printable(summarise(directory, command, options)))
        sys.exit(code)


def _check_one_task(settings: Sequence[str]) -> None:
    """Refuse several tasks unless one of them judges the settings."""
    for setting in settings:
        if len(tasks := task_choices(setting.replace("task.name=", "task=", 1))) > 1:
            raise ValueError(
                f"{setting}: several tasks are scored; choose one to compare by --metric {tasks[0]}/exact_match"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
