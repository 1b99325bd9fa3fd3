"""Settings of a sweep, compared over seeds."""

import pytest

from launch.experiments.comparison import Comparison, compare, draw, table, verdict
from launch.sweep import results
from tests.launch.experiments.sweeps import write_jobs, write_metrics, write_scores

LR, EPOCHS = ("optim.lr=1e-3", "optim.lr=2e-3"), ("trainer.total_epochs=2", "trainer.total_epochs=5")


def jobs(*values, axes=(LR,), seeds=3, fixed=("data=x",)):
    """Overrides of the grid with the seed last, and their values in order."""
    grid = [[*fixed]]
    for axis in (*axes, [f"seed={seed}" for seed in range(seeds)]):
        grid = [[*overrides, each] for overrides in grid for each in axis]
    return list(zip(grid, values, strict=True))


def compared(tmp_path, *values, metric=None, **changes):
    return compare(results(write_jobs(tmp_path / "sweep", jobs(*values, **changes))), metric)


def test_varied_settings_are_axes_and_seeds_repeat_them(tmp_path):
    comparison = compared(tmp_path, *range(12), axes=(LR, EPOCHS))
    assert comparison.axes == ["optim.lr", "trainer.total_epochs"]
    assert list(comparison.groups) == [("1e-3", "2"), ("1e-3", "5"), ("2e-3", "2"), ("2e-3", "5")]
    means = comparison.estimates("val/elbo")
    assert [means[key].mean for key in comparison.groups] == [1, 4, 7, 10]
    assert {means[key].count for key in means} == {3}


def test_the_margin_is_over_equal_seeds(tmp_path):
    """Seeds differ by far more than the settings do, but always in the same direction."""
    comparison = compared(tmp_path, 1.0, 2.0, 3.0, 0.9, 1.8, 2.9)
    assert comparison.ranking() == [("2e-3",), ("1e-3",)]
    margin = comparison.margin(("2e-3",), ("1e-3",))
    assert margin.mean == pytest.approx(0.4 / 3)
    assert margin.mean < margin.half
    text = verdict(comparison)
    assert text.startswith("Best: `optim.lr=2e-3` with val/elbo 1.867 ± ")
    assert "within the spread over 3 seeds" in text


def test_a_margin_beyond_the_spread(tmp_path):
    assert "more than the spread over 3 seeds" in verdict(compared(tmp_path, 1.0, 2.0, 3.0, 0.5, 1.51, 2.49))


def test_one_seed_is_named_as_chance(tmp_path):
    assert "may be chance" in verdict(compared(tmp_path, 1.0, 2.0, seeds=1))


def test_seeds_that_change_nothing_show_no_spread(tmp_path):
    text = verdict(compared(tmp_path, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5))
    assert "each of 3 seeds, which change nothing" in text
    assert "more than" not in text


@pytest.mark.parametrize("seed", ["seed", "sampling.seed"])
def test_both_kinds_of_seeds_repeat_settings(tmp_path, seed):
    sweep = write_jobs(tmp_path / "sweep", jobs(1.0, 2.0, 3.0, 0.9, 1.8, 2.9))
    for file in sweep.rglob("job.json"):
        file.write_text(file.read_text().replace('"seed=', f'"{seed}='))
    comparison = compare(results(sweep))
    assert comparison.axes == ["optim.lr"]
    assert comparison.margin(("2e-3",), ("1e-3",)).count == 3


def test_accuracy_is_better_when_it_is_higher(tmp_path):
    sweep = write_jobs(tmp_path / "sweep", jobs(1.0, 2.0, 3.0, 4.0, seeds=2))
    for job, right in enumerate((0.9, 0.8, 0.5, 0.6)):
        write_scores(sweep / str(job), equations=right)
    comparison = compare(results(sweep))
    assert (comparison.metric, comparison.ranking()[0]) == ("exact_match", ("1e-3",))
    assert comparison.margin(("1e-3",), ("2e-3",)).mean == pytest.approx(0.3)
    assert compare(results(sweep), "val/elbo").ranking()[0] == ("1e-3",)


def test_several_tasks_are_judged_by_one(tmp_path):
    sweep = write_jobs(tmp_path / "sweep", jobs(1.0, 2.0, seeds=1))
    for job, right in enumerate((0.2, 0.8)):
        write_scores(sweep / str(job), equations=right, rows=1 - right)
    with pytest.raises(ValueError, match=r"--metric equations/exact_match or --metric rows/exact_match"):
        compare(results(sweep))
    comparison = compare(results(sweep), "equations/exact_match")
    assert comparison.ranking() == [("2e-3",), ("1e-3",)]
    assert comparison.margin(("2e-3",), ("1e-3",)).mean == pytest.approx(0.6)
    assert compare(results(sweep), "rows/exact_match").ranking()[0] == ("1e-3",)


@pytest.mark.parametrize(
    ("metric", "higher"),
    [("val/elbo", False), ("val/accuracy", True), ("rows/tokens_per_forward", True), ("rows/nfe", False)],
)
def test_which_metrics_are_better_when_higher(metric, higher):
    assert Comparison([], metric, {}).higher == higher


def test_failed_jobs_are_left_out(tmp_path):
    comparison = compared(tmp_path, 1.0, None, 3.0, 4.0, 5.0, 6.0)
    assert len(comparison.groups["1e-3",]) == 2
    assert comparison.margin(("1e-3",), ("2e-3",)).count == 2


def test_no_finished_job_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"none of 2 jobs .*job 0: out of luck"):
        compared(tmp_path, None, None, seeds=1)
    with pytest.raises(ValueError, match=r"none of 0 jobs"):
        compare([])


@pytest.mark.parametrize("metric", ["val/elbow", "job", "optim.lr", "status", "error"])
def test_what_is_no_metric_of_a_job_is_an_error(tmp_path, metric):
    with pytest.raises(ValueError, match=rf"--metric {metric}: .*val/elbo"):
        compared(tmp_path, 1.0, 2.0, seeds=1, metric=metric)


def test_a_metric_without_a_value_is_none(tmp_path):
    sweep = write_jobs(tmp_path / "sweep", jobs(1.0, 2.0, seeds=1))
    for job in "01":
        write_metrics(sweep / job, [None])
    with pytest.raises(ValueError, match=r"--metric val/elbo: no job has it; .*train/loss"):
        compare(results(sweep))


def test_jobs_that_vary_other_settings_are_compared(tmp_path):
    comparison = compare(results(write_jobs(tmp_path / "sweep", [([LR[0]], 1.0), ([EPOCHS[0]], 2.0)])))
    assert list(comparison.groups) == [("1e-3", "default"), ("default", "2")]


def test_a_run_that_is_only_repeated_has_no_best(tmp_path):
    comparison = compared(tmp_path, 1.0, 2.0, axes=(), seeds=2)
    assert verdict(comparison) == "val/elbo 1.5 ± 6.4 over 2 seeds."
    assert table(comparison).splitlines()[0] == "| seeds | val/elbo | seconds |"


def test_the_table(tmp_path):
    assert table(compared(tmp_path, 1.0, 2.0, seeds=1)).splitlines() == [
        "| optim.lr | seeds | val/elbo | seconds |",
        "|---|---|---|---|",
        "| 1e-3 | 1 | 1 | 30 |",
        "| 2e-3 | 1 | 2 | 30 |",
    ]


@pytest.mark.parametrize("axes", [(LR,), (LR, EPOCHS)], ids=len)
def test_the_picture_is_the_same_from_the_same_numbers(tmp_path, axes):
    comparison = compared(tmp_path, *range(1, 1 + 2 * 2 ** len(axes)), axes=axes, seeds=2)
    picture = draw(comparison)
    assert picture == draw(comparison)
    assert b"<svg" in picture


def test_one_setting_has_no_picture(tmp_path):
    assert draw(compared(tmp_path, 1.0, 2.0, axes=(), seeds=2)) is None
