"""Print the number of ranks for a run: `python -m launch.ranks DEVICES ARGUMENTS_OF_TRAIN …`, for local.sh."""

import sys

from launch.cli import user_errors
from launch.settings import read_settings
from trainer.config import Config, batch_layout


def most_ranks(devices: int, config: Config) -> int:
    """The largest number of ranks up to the devices that divides the batch; all if none does: the run then says why."""

    def fits(ranks: int) -> bool:
        try:
            batch_layout(config.data, 0, ranks)
        except ValueError:
            return False
        return ranks % config.trainer.replicate == 0

    return next(filter(fits, range(devices, 0, -1)), devices)


if __name__ == "__main__":
    with user_errors(debug=False):
        devices, *arguments = sys.argv[1:]
        print(most_ranks(int(devices), read_settings(arguments)[1]))
