"""Try out a model on a page: `python -m launch.playground model.path=outputs/quickstart/hf`.

Takes the settings of sample.py, and of its own

  launch.host=127.0.0.1   0.0.0.0 lets other machines use the model
  launch.port=7860
  launch.waiting=8        runs that may wait for the one that is sampled

Needs the extra `page`. The page keeps no files, and asks no other host for anything.
"""

import sys
from collections.abc import Sequence
from threading import Event, Lock

from data.terminal import print_stderr
from launch.address import bind, listen
from launch.arguments import group_choices, split_config_dir
from launch.cli import quiet_libraries, user_errors
from launch.playground.config import PlaygroundConfig
from launch.playground.runs import Playground
from launch.settings import own_names, read_own_settings, read_settings
from sampling import SamplingConfig
from trainer.build import load_for_sampling
from trainer.distributed import check_alone


class Presets:
    """Settings of the choices of `sampling`, for the model of a command line."""

    def __init__(self, arguments: Sequence[str]):
        self._shared = [each for each in arguments if not each.lstrip("+").startswith("sampling")]
        self._lock = Lock()  # Hydra composes one tree at a time
        self.names = group_choices(split_config_dir(arguments)[0])["sampling"]

    def __call__(self, name: str) -> SamplingConfig:
        """Settings of a choice.

        Raises:
            ValueError: no such choice.
        """
        with self._lock:
            return read_settings([*self._shared, f"sampling={name}"], own_names(PlaygroundConfig))[1].sampling


def serve(arguments: Sequence[str]) -> None:
    """Serve the page until SIGINT.

    Raises:
        ValueError: see `read_own_settings`, `bind`, `listen` and `load_for_sampling`; or gradio is missing.
    """
    check_alone("launch.playground", "python -m launch.playground")
    own, config, lines = read_own_settings("launch.playground", PlaygroundConfig, arguments)
    bind(own.host, own.port).close()  # a port in use is an error before the model is loaded
    try:
        from launch.playground.page import Page, serve_page
    except ImportError as error:
        if error.name != "gradio":
            raise
        raise ValueError("launch.playground needs gradio: pip install 'diffllm[page]'") from error
    for line in sorted(lines):
        print_stderr(line)
    quiet_libraries()
    model, tokenizer = load_for_sampling(config)
    model.check_sampling(config.sampling)
    presets = Presets(arguments)
    page = Page(Playground(model, tokenizer, config, own.waiting), presets.names, presets)
    with bind(own.host, own.port) as bound:
        listen(bound)  # gradio binds it again, with an error that names neither setting
    blocks = serve_page(page, own.host, own.port)
    print(f"{blocks.local_url} (Ctrl-C ends it)", flush=True)
    Event().wait()


if __name__ == "__main__":
    with user_errors(debug=False):
        if {"-h", "--help"} & set(sys.argv[1:]):
            sys.exit(print(__doc__))
        serve(sys.argv[1:])
