"""python -m launch.show: rows without a run."""

import pytest

from launch.show import show
from tests.data.rows import row, write


def test_rows_of_a_file_are_shown(tmp_path, capsys):
    file = write(tmp_path / "mine.jsonl", *(row(f"question {i}") for i in range(8)))
    settings = [
        f"data.train_files=[{file}]",
        "data.val_split=0.2",
        f"data.cache_dir={tmp_path}",
        "data.train_batch_size=3",
    ]
    show(["rows=12", *settings])
    printed = capsys.readouterr().out
    assert "6 of 8 rows" in printed
    assert len([line for line in printed.splitlines() if line.startswith("row ")]) == 12
    assert "mine.jsonl:" in printed


@pytest.mark.parametrize(
    ("argument", "message"),
    [("rows=many", "rows=many: must be a whole number"), ("row=3", r"row=3: no such setting")],
)
def test_wrong_arguments(argument, message):
    with pytest.raises(ValueError, match=message):
        show([argument])
