"""The command that measures on a GPU, with tiny shapes."""

import json

import pytest

from tests.benchmarks import gpu


def run(tmp_path, *cases):
    code = gpu.main([*cases, "--output", str(tmp_path)])
    return code, json.loads((tmp_path / "gpu.json").read_text())["cases"], (tmp_path / "gpu.md").read_text()


def test_a_case_is_measured_and_checked(tmp_path, capsys):
    code, cases, page = run(tmp_path, "ragged")
    assert code == 0
    assert [row["variant"] for row in cases["ragged"]["rows"]] == ["tiny sdpa", "tiny varlen"]
    assert all(row["ms"] > 0 and row["tokens_per_second"] > 0 for row in cases["ragged"]["rows"])
    assert [equality["holds"] for equality in cases["ragged"]["equalities"]] == [True]
    assert "| tiny varlen | " in page
    assert "loss without padding: " in page
    assert "tiny varlen" in capsys.readouterr().out


@pytest.mark.parametrize("distance", [0.5, float("nan")])
def test_an_equality_that_fails_is_the_exit_code(tmp_path, capsys, monkeypatch, distance):
    def differs(report):
        report.add("ours", 1.0)
        report.check("a loss", distance, 0.1)

    monkeypatch.setitem(gpu.CASES, "step", differs)
    code, cases, page = run(tmp_path, "step")
    assert code == 1
    assert cases["step"]["equalities"][0]["holds"] is False
    assert "FAILS" in page
    assert "error: a loss: " in capsys.readouterr().err


def test_a_case_that_ends_early_leaves_the_others(tmp_path, capsys, monkeypatch):
    def ends(report):
        report.add("ours", 1.0)
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setitem(gpu.CASES, "step", ends)
    code, cases, page = run(tmp_path, "step", "ragged")
    assert code == 1
    assert [row["variant"] for row in cases["step"]["rows"]] == ["ours"]
    assert cases["step"]["error"] == "RuntimeError: no kernel"
    assert cases["ragged"]["error"] is None
    assert "ended early: RuntimeError: no kernel" in page
    assert "error: step ended early: RuntimeError: no kernel" in capsys.readouterr().err


def test_an_unknown_case(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "stepp")
    assert (
        "stepp: no such case; choose from step, ragged, head, rating, blocks, train, sample" in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", gpu.CASES)
def test_every_case_runs(tmp_path, case):
    code, cases, _ = run(tmp_path, case)
    assert code == 0
    assert len(cases[case]["rows"]) >= 2
