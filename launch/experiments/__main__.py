"""Run an experiment and summarise it: `python -m launch.experiments ar_vs_diffusion quickstart`.

Starts train.py with a recipe, the sweep NAME and further settings. Then scores, compares and draws the jobs, as
`launch.experiments.sweep` does. Everything goes into a new directory in multirun/.
"""

import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from data.terminal import Parser, ending_in_one_line, printable
from launch import ROOT
from launch.experiments.page import PAGE, split_at
from launch.experiments.sweep import add_options, summarise

# Options of the summary by the names of the sweeps.
SWEEPS = {
    "quick": {"evaluate": True},
    "sweep_lr": {},
    "ablate_data": {"evaluate": True},
    "ablate_equations": {"evaluate": True},
    "ar_vs_diffusion": {"evaluate": True},
    "repeat_data": {"curves": True},
}


def main(arguments: list[str]) -> None:
    parser = Parser("launch.experiments", __doc__)
    parser.add_argument("name", choices=SWEEPS, metavar="NAME", help=", ".join(SWEEPS))
    parser.add_argument("recipe", metavar="RECIPE", help="a choice of conf/experiment, such as quickstart")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="of train.py; several values are compared")
    add_options(parser)
    with ending_in_one_line():
        options = parser.parse_intermixed_args(arguments)
        if options.readme:
            split_at(options.readme, PAGE)
        directory = Path("multirun", f"{options.name}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
        sweep = [
            "-m",
            f"experiment=[{options.recipe},{options.name}]",
            f"hydra.sweep.dir={directory}",
            *options.settings,
        ]
        code = subprocess.run([sys.executable, ROOT / "train.py", *sweep]).returncode
        if code > 1 or not directory.exists():  # 1: a job failed
            sys.exit(code)
        vars(options).update(SWEEPS[options.name])
        command = f"python -m launch.experiments {shlex.join([options.name, options.recipe, *options.settings])}"
        print(printable(summarise(directory, command, options)))
        sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
