"""The list of the commands."""

from pathlib import Path

from data.terminal import MODULES, SCRIPTS
from diffllm.__main__ import COMMANDS, main
from tests.conftest import ROOT


def test_every_command_is_listed_with_an_example(capsys):
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*COMMANDS]
    assert {*SCRIPTS, *MODULES} - COMMANDS.keys() == {"diffllm", "launch.ranks"}  # itself, and a part of local.sh
    for name, (_, example) in COMMANDS.items():
        assert name in example
        assert len(example) < 80
    assert all(Path(ROOT, name).is_file() for name in SCRIPTS)
