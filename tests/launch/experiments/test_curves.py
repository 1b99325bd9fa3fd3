"""Validations over epochs: where a setting starts to overfit."""

import pytest

from launch.experiments.comparison import compare
from launch.experiments.curves import curves, draw, table, verdict
from launch.sweep import results
from tests.launch.experiments.sweeps import write_jobs, write_metrics

OVERFITS, LATER, NEVER = [3.0, 2.0, 2.5, 4.0], [3.0, 2.5, 1.5, 3.0], [4.0, 3.0, 2.0, 1.0]


def found(tmp_path, *values):
    """The curves of `diffusion=elbo` and `diffusion=causal` with two seeds each."""
    grid = [[f"diffusion={name}", f"seed={seed}"] for name in ("elbo", "causal") for seed in (0, 1)]
    sweep = write_jobs(tmp_path / "sweep", [(overrides, 1.0) for overrides in grid])
    for job, (each, metric) in enumerate(zip(values, ["val/elbo"] * 2 + ["val/nll"] * 2, strict=True)):
        write_metrics(sweep / str(job), each, metric)
    comparison = compare(results(sweep))
    return comparison, curves(comparison, {job: sweep / str(job) for job in range(4)})


def test_the_lowest_value_and_its_epoch(tmp_path):
    comparison, both = found(tmp_path, NEVER, NEVER, OVERFITS, LATER)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(comparison, both).splitlines()[2:]]
    assert lines[0] == ["elbo", "2", "val/elbo", "1 ± 0", "4 ± 0", "1 ± 0", "4"]
    assert lines[1][:3] == ["causal", "2", "val/nll"]
    assert lines[1][4].startswith("2.5 ± ")
    assert verdict(comparison, both) == (
        "`diffusion=elbo` does not overfit within 4 epochs. `diffusion=causal` overfits after 2 to 3 epochs."
    )
    assert b"<svg" in draw(comparison, both)


def test_seeds_that_disagree(tmp_path):
    assert "after 2 epochs or more, with some seeds not within 4" in verdict(
        *found(tmp_path, OVERFITS, NEVER, NEVER, NEVER)
    )


def test_a_job_without_validation_is_named(tmp_path):
    sweep = write_jobs(tmp_path, [(["seed=0"], 1.0)], "train/elbo")
    with pytest.raises(ValueError, match=r"0: has no validation"):
        curves(compare(results(sweep)), {0: sweep / "0"})
