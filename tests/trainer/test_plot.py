"""Curves of runs: what is read, what belongs together, and the files."""

import json
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from trainer import plot
from trainer.config import Config, OptimConfig, to_dict
from trainer.curves import POINTS, band, find_runs, group, read_run


@pytest.fixture
def write(tmp_path):
    """Write a run: its records, and its settings if there are any."""

    def written(name, records, config=None):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
        (directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        if config is not None:
            (directory / "settings.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        return directory

    return written


def steps(*values, name="train/loss", first=1):
    return [{"step": step, name: value} for step, value in enumerate(values, first)]


def test_only_finite_numbers_are_points(write):
    run = read_run(write("run", [*steps(1.0, None, 3), '{"step": 4, "train/loss": NaN, "a": "b", "c": true}']))
    assert list(run.points) == ["train/loss"]
    at, values = run.points["train/loss"]
    assert (at.tolist(), values.tolist()) == ([1, 3], [1, 3])
    assert run.settings is None


def test_numbers_beyond_those_of_a_float_are_no_points(write):
    run = read_run(write("run", [*steps(1.0), {"step": 10**400, "train/loss": 2.0}, *steps(10**400, 3.0, first=2)]))
    assert run.points["train/loss"][1].tolist() == [1, 3]


def test_settings_and_metrics_of_any_text(write, tmp_path):
    odd = {"train/loss": 1.0, "val/nll_t_1.2.3_4": 1.0}
    for name, text in (("one", 'lr: "\\ud800"\n1: a\n'), ("two", "lr: 1\nnull: b\n")):
        (write(name, [{"step": step} | odd for step in (1, 2)]) / "settings.yaml").write_text(text)
    plot.main([str(tmp_path), "--output", str(tmp_path / "drawn")])
    assert "\\ud800" in (tmp_path / "drawn" / "curves.html").read_text()


@pytest.mark.parametrize(
    ("lines", "place"),
    [
        (["{", *steps(1.0)], "metrics.jsonl:1"),
        (["[1]"], "metrics.jsonl:1"),
        ([{"train/loss": 1.0}], "without a step"),
        ([], "no metric with a number"),
        (steps(None, None), "no metric with a number"),
    ],
)
def test_metrics_that_cannot_be_drawn(write, lines, place):
    with pytest.raises(ValueError, match=place):
        read_run(write("run", lines))


def test_a_line_that_is_being_written_is_left_out(write, capsys):
    directory = write("run", steps(1.0, 2.0))
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tr')
    assert read_run(directory).points["train/loss"][0].tolist() == [1, 2]


@pytest.mark.parametrize("content", ["a: [", "- a", "\x00"])
def test_settings_that_are_damaged(write, content):
    directory = write("run", steps(1.0))
    (directory / "settings.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"settings\.yaml"):
        read_run(directory)


def test_runs_of_a_directory(write, tmp_path):
    jobs = [write(f"sweep/{job}", steps(1.0)) for job in range(2)]
    assert find_runs(jobs[1]) == [jobs[1]]
    assert find_runs(tmp_path / "sweep") == jobs
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match=re.escape(str(place))):
            find_runs(place)


def lr(value: float, seed: int = 0, **changes) -> Config:
    config = Config(optim=OptimConfig(lr=value, **changes), seed=seed)
    config.trainer.output_dir = f"outputs/{value}_{seed}"
    return config


def test_seeds_belong_together(write):
    configs = [lr(1e-5), lr(1e-4, seed=1), lr(1e-5, seed=2), lr(1e-4, seed=3)]
    runs = [read_run(write(str(number), steps(1.0), config)) for number, config in enumerate(configs)]
    found = group(runs)
    assert [each.label for each in found] == ["optim.lr=1e-05", "optim.lr=0.0001"]
    assert [[run.directory.name for run in each.runs] for each in found] == [["0", "2"], ["1", "3"]]
    [alone] = group(runs[::2])
    assert alone.label == str(runs[0].directory)


def test_labels_of_many_settings_and_of_none(write):
    changes = {"weight_decay": 0.5, "clip_grad": 2.0, "lr_schedule": "linear", "warmup_steps_ratio": 0.5}
    first = write("first", steps(1.0), lr(1e-5))
    second = write("second", steps(1.0), lr(1e-4, **changes))
    found = group([read_run(first), read_run(second)])
    assert found[1].label.startswith("optim.lr=0.0001 optim.weight_decay=0.5 ")
    assert found[1].label.endswith(" and 1 more")
    assert len(found[1].settings) == 5
    named = lr(1e-4)
    named.data.filter = "x" * 50
    third = read_run(write("third", steps(1.0), named))
    assert group([read_run(first), third])[1].label == f"data.filter={'x' * 40}… optim.lr=0.0001"
    bare = [read_run(write(name, steps(1.0))) for name in ("a", "b")]
    assert [each.label for each in group(bare)] == [str(run.directory) for run in bare]


def test_a_band_is_of_the_means_of_each_run(write):
    runs = [read_run(write(name, steps(*values))) for name, values in (("a", [1, 2, 3]), ("b", [3, 2]))]
    found = band(runs, "train/loss")
    assert found.steps.tolist() == [1, 2, 3]
    assert [curve.tolist() for curve in found[1:]] == [[2, 2, 3], [1, 2, 3], [3, 2, 3]]
    assert band(runs, "val/elbo") is None


def test_many_steps_become_few_points(write):
    values = np.random.default_rng(0).normal(size=10 * POINTS)
    found = band([read_run(write("run", steps(*values)))], "train/loss")
    assert len(found.steps) == POINTS
    assert found.steps[:2].tolist() == [5.5, 15.5]
    assert found.mean == pytest.approx(values.reshape(POINTS, 10).mean(1))
    odd = band([read_run(write("odd", steps(*values[: POINTS + 1])))], "train/loss")
    assert len(odd.steps) == POINTS // 2 + 1


def titles(*directories) -> list[str]:
    figure = plot.draw(group([read_run(directory) for directory in directories]))
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_panels_of_what_is_there(write, default_run):
    assert titles(default_run) == [panel.title for panel in plot.PANELS]
    assert titles(write("causal", steps(1.0, name="val/nll"))) == ["bound"]
    with pytest.raises(ValueError, match="own"):
        titles(write("own", steps(1.0, name="val/mine")))


def test_a_logarithm_for_values_of_several_sizes(write):
    for name, values, scale in (("a", (100.0, 1.0), "log"), ("b", (2.0, 1.0), "linear"), ("c", (100.0, 0.0), "linear")):
        [axes] = plot.draw(group([read_run(write(name, steps(*values)))])).axes
        assert axes.get_yscale() == scale


def test_lines_and_bands(write):
    configs = [lr(1e-5, seed=0), lr(1e-5, seed=1), lr(1e-4)]
    names = [f"val/nll_t_{low:g}_{low + 0.25:g}" for low in (0.25, 0, 0.75, 0.5)]
    records = [{"step": 1, "train/elbo": 2.0, "val/elbo": 3.0} | dict.fromkeys(names, 1.0)]
    runs = [read_run(write(str(number), records, config)) for number, config in enumerate(configs)]
    bound, by_t = plot.draw(group(runs)).axes
    assert len(bound.collections) == 2  # training and validation of the first setting
    assert [text.get_text() for text in bound.get_legend().get_texts()] == ["training", "validation"]
    labels = [text.get_text() for text in by_t.get_legend().get_texts()]
    assert labels == [f"t from {low:g} to {low + 0.25:g}" for low in (0, 0.25, 0.5, 0.75)]
    drawn = [line for line in by_t.lines if len(line.get_xdata())]
    assert len({line.get_linestyle() for line in drawn}) == 4
    assert len({line.get_color() for line in drawn}) == 2
    causal = read_run(write("causal", [{"step": 1, "train/nll": 2.0, "val/nll": 3.0}], lr(1e-2)))
    both = plot.draw(group([*runs, causal])).axes[0]
    assert [text.get_text() for text in both.get_legend().get_texts()] == ["training", "validation"]
    _, alone = plot.draw(group(runs[:1])).axes
    assert len({line.get_color() for line in alone.lines}) == 4


def test_the_page_needs_nothing_else(write, default_run):
    odd = write("<b>&$x$", steps(1.0, 2.0), lr(1.0))
    groups = group([read_run(default_run), read_run(odd)])
    page = plot.page(plot.draw(groups), groups)
    assert re.findall(r"""(?:src|href)=["'](?!#)|@import|<script|url\((?!#)""", page) == []
    assert "<b>" not in page
    assert plot.INK not in page
    assert "currentColor" in page
    assert "prefers-color-scheme: dark" in page
    svg = page[page.index("<svg") : page.index("</svg>") + len("</svg>")]
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    assert len(rows) == 3
    assert "<td>2.0000</td>" in rows[2]
    again = group([read_run(default_run), read_run(odd)])
    assert plot.page(plot.draw(again), again) == page


def test_the_command(default_run, tmp_path, capsys):
    run = shutil.copytree(default_run, tmp_path / "run")
    plot.main([str(run)])
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    plot.main([str(run), str(default_run), "--output", str(tmp_path / "new" / "place")])
    assert {file.name for file in (tmp_path / "new" / "place").iterdir()} == {"curves.png", "curves.html"}
    assert "2 runs: " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("missing", ["run", "matplotlib"])
def test_an_error_is_one_line(default_run, tmp_path, monkeypatch, missing):
    directory = default_run if missing == "matplotlib" else tmp_path
    if missing == "matplotlib":
        monkeypatch.setattr(plot, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as exit:
        plot.main([str(directory), "--output", str(tmp_path / "new")])
    assert str(exit.value).startswith("error: ")
    assert (str(tmp_path) if missing == "run" else "diffllm[plot]") in str(exit.value)
    assert not (tmp_path / "new").exists()
