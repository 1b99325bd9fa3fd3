"""What a result is read for: its settings, intervals and table."""

import pytest

from launch.results import interval, score_table, settings
from trainer.config import Config, to_dict

SCORES = {"questions": 10, "skipped": 0, "right": 5, "exact_match": 0.5, "interval": interval(5, 10), "nfe": 3.0}


@pytest.mark.parametrize(
    ("right", "questions", "low", "high"),
    [  # of the published formula, to four places
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),  # Newcombe, Statistics in Medicine 1998
        (15, 148, 0.0624, 0.1605),  # likewise
    ],
)
def test_intervals(right, questions, low, high):
    assert interval(right, questions) == pytest.approx([low, high], abs=5e-5)


def test_settings_that_an_evaluation_reads():
    names = settings({"config": to_dict(Config())})
    assert {"sampling.steps", "model.path", "task.mc_num", "data.val_files", "seed"} <= names.keys()
    assert not {name.partition(".")[0] for name in names} & {"optim", "trainer", "diffusion", "prompt"}
    assert "data.train_files" not in names


def test_a_line_for_each_task():
    head, a, b = score_table([(["a"], SCORES), (["b"], SCORES | {"similarity": 0.25, "no_answer": 1})]).splitlines()
    assert head.split("  ")[0] == "task"
    assert "similarity" in head
    assert a.split() == ["a", "5", "of", "10", "50.0%", "23.7%", "to", "76.3%", "3"]
    assert b.split() == ["b", *a.split()[1:-1], "25.0%", "100.0%", "3"]
