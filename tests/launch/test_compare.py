"""Results compared: what differs first, then scores, then pairs."""

import json

import pytest

from launch.compare import compare_results, main, mcnemar
from launch.results import interval
from trainer.config import Config, to_dict


def write(path, right: dict[str, list[bool]], digest: str = "abc", **changes):
    """A result with these answers by task."""
    config = Config()
    for name, value in changes.items():
        group, field = name.split("__")
        setattr(getattr(config, group), field, value)
    scores = {
        task: {
            "questions": len(each), "right": sum(each), "exact_match": sum(each) / len(each),
            "interval": interval(sum(each), len(each)), "nfe": 2.0,
        }
        for task, each in right.items()
    }  # fmt: skip
    record = {
        "scores": scores,
        "origin": {f"rows of {task}": digest for task in right} | {"the model's weights": "w"},
        "judges": dict.fromkeys(right, "exact"),
        "versions": {"torch": "2"},
        "device": "CPU",
        "dtype": "float32",
        "ranks": 1,
        "config": to_dict(config),
        "answers": {task: [{"right": ok} for ok in each] for task, each in right.items()},
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))
    return str(path)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1), (3, 3, 1), (0, 1, 1), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (0, 6, 2 / 64), (5000, 5000, 1)],
)
def test_mcnemar(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == pytest.approx(p)


def test_large_counts_do_not_overflow():
    assert 0 < mcnemar(4800, 5200) < 1e-3


def test_what_differs_comes_before_the_scores(tmp_path, capsys):
    a = write(tmp_path / "a" / "evaluation.json", {"t": [True] * 8 + [False] * 2}, sampling__steps=4)
    b = write(tmp_path / "b" / "other.json", {"t": [True, *[False] * 8, True], "u": [True]}, trainer__max_steps=3)
    compare_results([str(tmp_path / "a"), b])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"A  {tmp_path / 'a'}", f"B  {b}"]
    place = lines.index("")
    assert lines[place + 1].split() == ["differs", "A", "B"]
    assert lines[place + 2].split() == ["sampling.steps", "4", "None"]
    assert lines[place + 3] == ""
    assert [line.split()[:6] for line in lines[place + 5 : place + 8]] == [
        ["t", "A", "8", "of", "10", "80.0%"], ["t", "B", "2", "of", "10", "20.0%"], ["u", "B", "1", "of", "1", "100.0%"]
    ]  # fmt: skip
    assert lines[-1].startswith("t, A and B: of the same 10 questions only the first solved 7, only the second 1;")
    assert lines[-1].endswith(f"p = {mcnemar(7, 1):.2g}")
    compare_results([a, a])
    assert "no setting, version, digest or device differs" in capsys.readouterr().out


def test_other_questions_are_not_paired(tmp_path, capsys):
    files = [write(tmp_path / f"{digest}.json", {"t": [True]}, digest) for digest in ("a", "b", "b")]
    compare_results(files)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["rows", "of", "t", "a", "b", "b"] for line in lines)
    assert [line for line in lines if "no paired test" in line] == [
        "t, A and B: other questions, so no paired test", "t, A and C: other questions, so no paired test"
    ]  # fmt: skip
    assert lines[-1].startswith("t, B and C: of the same 1 questions")


@pytest.mark.parametrize("count", [1, 27])
def test_a_wrong_number_of_results(count):
    with pytest.raises(ValueError, match=f"^{count} results: give 2 to 26"):
        compare_results(["a.json"] * count)


DAMAGE = {
    "no answers": lambda record: record["answers"].clear(),
    "one answer fewer": lambda record: record["answers"]["t"].pop(),
    "another answer": lambda record: record["answers"]["t"][0].update(right=False),
    "answers of no form": lambda record: record["answers"].update(t=[1, 2]),
    "no interval": lambda record: record["scores"]["t"].pop("interval"),
    "no score": lambda record: record["scores"]["t"].update(exact_match=None),
    "no scores": lambda record: record["scores"].update(t=None),
    "no versions": lambda record: record.update(versions=None),
    "no config": lambda record: record.update(config=[]),
    "no origin": lambda record: record.update(origin={}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_result_is_named_before_anything_is_printed(tmp_path, capsys, damage):
    a, b = (write(tmp_path / f"{name}.json", {"t": [True, False]}) for name in "ab")
    record = json.loads((tmp_path / "b.json").read_text())
    damage(record)
    (tmp_path / "b.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"b\.json: its parts do not belong together"):
        compare_results([a, b])
    assert capsys.readouterr().out == ""


def test_no_common_task(tmp_path):
    files = [write(tmp_path / f"{task}.json", {task: [True]}) for task in ("t", "u")]
    with pytest.raises(ValueError, match=r"no task is in two .*t\.json has t; .*u\.json has u"):
        compare_results(files)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file; evaluate.py writes it"),
        ("[]", "not a JSON object"),
        ('{"scores": {}}', "it has no origin"),
    ],
)
def test_no_result(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), str(tmp_path)])
    assert str(end.value).startswith(f"error: {tmp_path / 'evaluation.json'}")
    assert words in str(end.value)
    assert "\n" not in str(end.value)
