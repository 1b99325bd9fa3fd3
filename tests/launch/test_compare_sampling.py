"""python -m launch.compare_sampling: a grid of sampling settings on a few questions."""

import csv
import json
import shutil

import pytest

from diffllm.generate import Response
from launch import compare_sampling, sampling_page
from launch.compare_sampling import compare_strategies, read_combinations
from tests.conftest import GOLDEN
from tests.data.rows import write
from tests.locks import held_elsewhere


@pytest.fixture
def run(small_model, tokenizer, monkeypatch, tmp_path):
    """Compares settings on four questions: 3 right answers in 3 steps, 2 in others, none at a temperature."""
    file = write(tmp_path / "test.jsonl", *({"question": f"{i}+1?", "answer": f"<think></think>{i}"} for i in range(4)))
    monkeypatch.setattr(compare_sampling, "load_for_sampling", lambda _: (small_model, tokenizer))
    asked = []

    def generate(model, tokenizer, prompts, config, row_ids):
        asked.append((config.alg, config.steps, config.seed, len(prompts)))
        if config.block_length == 5:
            raise MemoryError("out of memory; lower sampling.batch_size")
        right = 0 if config.temperature else 3 if config.steps == 3 else 2
        for row_id in row_ids:
            yield Response(row_id, f"{row_id if row_id < right else 'no'}", 4, config.steps or 8, 0.5, True)

    monkeypatch.setattr(compare_sampling, "generate", generate)
    shared = [f"model.path={GOLDEN / 'dream_tiny'}", f"data.val_files={file}", f"trainer.output_dir={tmp_path / 'out'}"]

    def start(*arguments: str) -> tuple[bool, list]:
        asked.clear()
        own = [] if any("temperature" in each for each in arguments) else ["sampling.temperature=0"]
        done = compare_strategies([*shared, "sampling.batch_size=3", *own, *arguments])
        return done, [*asked]

    start.directory = tmp_path / "out"
    return start


def table(run) -> list[dict[str, str]]:
    return [*csv.DictReader((run.directory / "results.csv").open())]


def test_a_grid_is_answered_and_its_front_named(run, capsys):
    done, asked = run("sampling.alg=entropy,maskgit_plus", "sampling.steps=3,6")
    assert done
    warm, *measured = asked
    assert warm == ("entropy", 3, 0, 3)
    assert measured == [(alg, steps, 0, 4) for alg in ("entropy", "maskgit_plus") for steps in (3, 6)]
    rows = table(run)
    assert [row["accuracy"] for row in rows] == ["0.75", "0.5", "0.75", "0.5"]
    assert [row["nfe"] for row in rows] == ["3", "6", "3", "6"]
    assert ["nfe" in row["front"] for row in rows] == [True, False, True, False]
    assert float(rows[0]["low"]) < 0.75 < float(rows[0]["high"])
    assert "Front of accuracy and forwards an answer (nfe): entropy, 3 (75.0%, 3.0)" in capsys.readouterr().out
    page = (run.directory / "comparison.md").read_text()
    assert "\n| entropy | 3 | 75.0% |" in page
    assert "; sampling.top_p: 0.95; sampling.batch_size: 3\n" in page
    assert (run.directory / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_known_combinations_are_not_run_again(run):
    run("sampling.steps=3,6")
    before = table(run)
    assert run("sampling.steps=3,6") == (True, [])
    assert table(run) == before
    _, asked = run("sampling.steps=2,3")
    assert [steps for _, steps, _, _ in asked] == [2, 2]
    assert len(json.loads((run.directory / "results.json").read_text())["runs"]) == 3


def test_results_of_other_questions_are_refused(run):
    run("sampling.steps=3,6")
    with pytest.raises(ValueError, match=r"results\.json has other results: rows of rows was 4 rows"):
        run("sampling.steps=3,6", "data.subset=2")
    (run.directory / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results\.json has other results: .*model\.path was absent"):
        run("sampling.steps=3,6")


def test_a_failed_combination_does_not_stop_the_others(run, capsys):
    done, asked = run("sampling.transfer=linear,threshold", "sampling.remask=0,0.1", "sampling.block_length=4,5")
    assert not done
    assert len(asked) == 1 + 6  # four of them raise
    rows = table(run)
    assert [bool(row["accuracy"]) for row in rows] == [True, False, True, False, True, False, False, False]
    assert rows[1]["error"].startswith("out of memory")
    assert rows[6]["error"].startswith("sampling.remask=0.1: goes with a scheduled transfer")
    assert "failed: threshold, 0.1, 4: sampling.remask=0.1" in capsys.readouterr().out


def test_seeds_repeat_what_draws_at_random(run):
    _, asked = run("sampling.temperature=0,1", "seeds=0,1,2", "sampling.steps=3")
    assert [seed for _, _, seed, _ in asked[1:]] == [0, 0, 1, 2]
    assert [row["seeds"] for row in table(run)] == ["1", "3"]


def test_settings_of_the_checkpoint_are_taken(run, tmp_path, capsys):
    shutil.copytree(GOLDEN / "dream_tiny", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"alg": "topk_margin", "steps": 7}))
    _, asked = run(f"model.path={tmp_path / 'model'}", "sampling.steps=3,6")
    assert {(alg, steps) for alg, steps, _, _ in asked} == {("topk_margin", 3), ("topk_margin", 6)}
    assert capsys.readouterr().err.count("recommends: sampling.alg=topk_margin") == 1


def test_without_matplotlib_a_line_says_what_is_missing(run, monkeypatch, capsys):
    monkeypatch.setattr(sampling_page, "find_spec", lambda _: None)
    assert run("sampling.steps=3")[0]
    assert "diffllm[plot]" in capsys.readouterr().err
    assert not (run.directory / "comparison.png").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.subset=1,2", "data.subset=1,2: only settings of sampling"),
        ("sampling.compile=true,false", "only settings of sampling .* not sampling.compile"),
        ("sampling.algo=entropy,origin", r"sampling\.algo.*did you mean sampling\.alg"),
        ("sampling.alg=entropi", r"sampling\.alg=entropi: choose one of"),
        ("sampling=fast,dreem", "sampling=dreem: no such choice"),
        ("seeds=0,x", "seeds=0,x: give whole numbers"),
        ("seeds=0,1,0", "seeds=0,1,0: 0 given twice"),
        ("sampling.steps=2,2,3", "sampling.steps=2,2,3: 2 given twice"),
        ("sampling.batch_size=3,4", "sampling.batch_size is given twice"),
    ],
)
def test_wrong_arguments(run, argument, message):
    with pytest.raises(ValueError, match=message):
        run(argument)
    assert not run.directory.exists()


def test_two_commands_do_not_write_to_one_directory(run):
    run.directory.mkdir()
    with held_elsewhere(run.directory / ".lock"), pytest.raises(ValueError, match=r"another run writes to .*out"):
        run("sampling.steps=3,6")


@pytest.mark.parametrize("runs", [None, 3, [3], [{}], [{"sampling": {}}]])
def test_a_damaged_file_of_results_is_named(run, runs):
    run("sampling.steps=3,6")
    file = run.directory / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"runs": runs}))
    with pytest.raises(ValueError, match=r"results\.json has no runs"):
        run("sampling.steps=3,6")


def test_settings_that_are_not_read_are_named(run, capsys):
    run("sampling.steps=3,6", "optim.lr=5", "prompt=hi")
    assert "launch.compare_sampling does not read optim.lr, prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("task=[rows,gsm8k]", r"task\.name=\['rows', 'gsm8k'\]: .* one task"),
        ("task=gsm8k", r"data\.val_files=.* with task\.name=\['gsm8k'\]"),
    ],
)
def test_a_strategy_answers_one_task(run, argument, message):
    with pytest.raises(ValueError, match=message):
        run(argument)


def test_several_ranks_are_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"for one rank.*python -m launch\.compare_sampling"):
        run("sampling.steps=3")


def test_a_model_is_sampled(small_model, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(compare_sampling, "load_for_sampling", lambda _: (small_model, tokenizer))
    shared = [f"model.path={GOLDEN / 'dream_tiny'}", "data.subset=3", f"trainer.output_dir={tmp_path}"]
    choices = ["sampling=default,fast,llada", "sampling.max_new_tokens=4", f"--config-dir={tmp_path}"]
    assert compare_strategies([*shared, *choices])
    rows = csv.DictReader((tmp_path / "results.csv").open())
    assert [row["sampling"] for row in rows] == ["default", "fast", "llada"]


def test_a_setting_that_one_combination_uses_is_not_idle():
    grid = [("sampling.transfer=threshold",), ("sampling.transfer=linear",)]
    _, lines = read_combinations(["sampling.threshold=0.5", "sampling.factor=2"], grid, [])
    assert [line.split(" does")[0] for line in lines] == ["warning: sampling.factor=2"]
