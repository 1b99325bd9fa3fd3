"""The command line: exit codes, one-line errors, files of the scripts."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

import evaluate
import sample
import train
from launch import cli
from launch.settings import read_settings
from tests.conftest import GOLDEN, ROOT
from tests.trainer.runs import metrics

SMALL = [
    "data.max_length=64", "data.num_workers=0", "data.train_batch_size=8", "trainer.max_steps=3",
    "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1", "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
]  # fmt: skip


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Run a root script in this process, in an empty directory; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # which a script sets: it is gone after the test

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        os.environ.pop("HYDRA_FULL_ERROR", None)  # which the script before this one has set
        monkeypatch.setattr(sys, "argv", [str(ROOT / name), *arguments])
        namespace = __import__(name.removesuffix(".py"))
        capsys.readouterr()
        try:
            namespace.main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        return code, *capsys.readouterr()

    return run


def assert_one_error(result, *words):
    code, _, err = result
    assert code == 1
    [line, *more] = [line for line in err.strip().splitlines() if not line.startswith("sampling as ")]
    assert all(each.startswith("  ") for each in more)
    assert line.startswith("error: ")
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optim.lrr=1"], ["optim.lrr", "did you mean optim.lr"]),
        (["+optim.lrr=1"], ["optim.lrr", "did you mean optim.lr"]),
        (["lr=1"], ["lr=1: no such setting; did you mean optim.lr?"]),
        (["tiny"], ["tiny: write choices as GROUP=CHOICE; did you mean model=tiny?"]),
        (["dream"], ["did you mean diffusion=dream or sampling=dream?"]),
        (["dream_base/math"], ["did you mean sampling=dream_base/math?"]),
        (["sampling=dream_base/mth"], ["sampling=dream_base/mth", "did you mean dream_base/math"]),
        (["-m", "sampling=fast,bbh"], ["sampling=bbh", "did you mean dream_base/bbh or llada_base/bbh?"]),
        (["sampling/dream_base=math"], ["did you mean sampling=dream_base/math?"]),
        (["experiment=[quickstart,quik]"], ["experiment=quik", "did you mean quick"]),
        (["optm=adamw"], ["optm", "did you mean optim"]),
        (["optim=adamww"], ["optim=adamww", "did you mean adamw"]),
        (["-m", "data=s1k,s2k"], ["data=s2k", "did you mean s1k"]),
        (["-m", "optim.lr=1", "++optim.lr=3,4"], ["optim.lr is given twice"]),
        (["optim.lr=[1,2"], ["optim.lr=[1,2", "NAME=VALUE"]),
        (["data.filter=difficulty>3"], ["data.filter=difficulty>3", "once more for the shell: 'NAME=\"VALUE\"'"]),
        (["diffusion=null"], ["diffusion=null", "masked"]),
        (["task=null"], ["task=null", "no such choice"]),
        (["diffusion.objective=null"], ["diffusion.objective=None", "masked"]),
        (["seed=-1"], ["seed=-1", "[0, "]),
        (["optim.lr=fast"], ["optim.lr", "'fast'"]),
        (["diffusion.cart_p=0"], ["diffusion.cart_p=0.0", "(0, 1]"]),
        (["sampling.alg=entropi"], ["sampling.alg=entropi", "origin, maskgit_plus, topk_margin, entropy"]),
        (["data.train_files=[nowhere.jsonl]"], ["nowhere.jsonl", "no such file or folder"]),
        (["data.train_batch_size=7", "data.micro_batch_size_per_gpu=2"], ["size=7", "gpu=2", "ranks=1"]),
        (["data.train_batch_size=5000"], ["5000", "training rows", "\n  training: 2,750 of 2,750 rows\n"]),
        (["data.max_length=10"], ["2750 rows cannot be used:\n  equation", "do not fit data.max_length=10"]),
        (["model.mask_token=<|no|>"], ["model.mask_token=<|no|>: the model has <|mask|>; leave it out"]),
        (["data.max_length=4096"], ["data.max_length=4096", "context is 2048"]),
        (["model.vocab_size=50"], ["model.vocab_size=50", "1256"]),
        (["model.path=nowhere"], ["model.path=nowhere", "config.json"]),
        (["trainer.resume=nowhere", *SMALL], ["trainer.resume=nowhere", "no such checkpoint"]),
        (["trainer.replicate=3", *SMALL], ["trainer.replicate=3", "divide the 1 ranks"]),
        (["trainer.nonfinite=ignore"], ["trainer.nonfinite=ignore", "raise, skip"]),
        (["model.lora_rank=4", "model.target_modules=w_proj", *SMALL], ["w_proj", "all-linear or from", "q_proj"]),
        (["model.attn_implementation=flash_attention_2", *SMALL], ["flash_attention_2 needs a GPU", "sdpa or varlen"]),
        (["model.loss_kernel=liger", *SMALL], ["model.loss_kernel=liger needs a GPU"]),
        (["optim.name=adamw_8bit", *SMALL], ["optim.name=adamw_8bit", "trainer.async_checkpoints=false"]),
        (["optim.name=adamw_8bit", "trainer.async_checkpoints=false", *SMALL], ["adamw_8bit", "diffllm[torchao]"]),
    ],
    ids=str,
)
def test_mistakes_end_in_one_error(script, arguments, words):
    assert_one_error(script("train.py", *arguments), *words)


def test_an_interruption_is_no_error(script, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.build.rows_of", interrupted)
    assert script("train.py", *SMALL) == (130, "", "stopped by SIGINT\n")


def test_a_sweep_under_torchrun_is_refused(script, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_one_error(script("train.py", "-m", "optim.lr=1,2"), "start a sweep by `python train.py …`")
    assert_one_error(script("train.py", "experiment=sweep_lr"), "start a sweep by `python train.py …`")


def test_packages_of_another_checkout_are_refused(tmp_path):
    """A script beside its own `launch`, but with the other packages of this checkout."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "train.py", tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    expected = f"ImportError: package 'data' would come from {ROOT / 'data'}, expected {tmp_path / 'data'}"
    assert done.stderr.splitlines()[-1] == expected


def test_a_typo_in_a_yaml_file(script, monkeypatch, tmp_path):
    (tmp_path / "more" / "experiment").mkdir(parents=True)
    (tmp_path / "more" / "experiment" / "mine.yaml").write_text("# @package _global_\noptim:\n  lrr: 1\n")
    arguments = [f"hydra.searchpath=[file://{tmp_path / 'more'}]", "+experiment@_global_=mine"]
    monkeypatch.setattr(cli, "check_arguments", lambda arguments: None)
    assert_one_error(script("train.py", *arguments), "optim.lrr", "did you mean optim.lr")


@pytest.mark.parametrize(("name", "unread"), [("train", set()), ("sample", {"data", "optim"}), ("evaluate", {"optim"})])
def test_help_names_what_the_script_reads(script, monkeypatch, name, unread):
    monkeypatch.setenv("COLUMNS", "120")
    module = {"train": train, "sample": sample, "evaluate": evaluate}[name]
    for arguments in (["--help"], ["experiment=quickstart", "-h"]):
        code, out, err = script(f"{name}.py", *arguments)
        assert (code, err) == (0, "")
    assert out.startswith(module.__doc__)
    assert "conf/README.md" in out
    shown = set(re.findall(r"^  ([\w.]+) ", out.partition("Settings:")[2], re.MULTILINE))
    assert shown == {*module.READS, "experiment"}
    assert not shown & unread
    assert "dream_7b, " in out


def test_help_explains_the_settings_of_sample(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = script("sample.py", "--help")[1]
    assert re.search(r"^  mode  +answer \| chat, on the terminal$", out, re.MULTILINE)
    assert "<|mask:12|>" in out


def test_help_has_choices_of_ones_own(script, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "of_my_own.yaml").write_text("# @package _global_\n")
    assert "of_my_own" in script("train.py", "--config-dir", str(tmp_path), "--help")[1]


def test_one_rank_prints_the_help(script, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert script("train.py", "--help") == (0, "", "")


def test_the_tree_is_shown(script):
    code, out, _ = script("train.py", "--cfg", "job")
    assert code == 0
    assert "time_reweighting: original" in out


@pytest.mark.parametrize("text", ["a\\${x}", '"${seed}\\"', "\\\\${a}'"])
def test_any_prompt_gets_through_the_whole_command_line(script, monkeypatch, text):
    seen = []
    monkeypatch.setitem(sample.MODES, "answer", seen.append)
    assert script("sample.py", f"prompt={text}")[0] == 0
    assert [config.prompt for config in seen] == [text]


def test_a_task_is_chosen(script, monkeypatch):
    assert_one_error(script("evaluate.py", "task=equatons"), "task=equatons", "did you mean equations")
    assert_one_error(script("evaluate.py", "task.name=equatons"), "task.name=equatons", "did you mean equations")
    chosen = []
    monkeypatch.setattr(evaluate, "evaluate", chosen.append)
    assert_one_error(script("evaluate.py", "task=[rows,equatons]"), "task=equatons", "did you mean equations")
    for arguments in ([], ["task=rows"], ["task=[rows,equations]"], ["task=[rows]", "task.name=[equations,rows]"]):
        assert script("evaluate.py", *arguments)[0] == 0
    assert script("evaluate.py", "task.files.choice=a.jsonl")[0] == 0
    assert chosen.pop().task.files == {"choice": "a.jsonl"}
    assert [config.task.name for config in chosen] == [[], ["rows"], ["rows", "equations"], ["equations", "rows"]]


def test_several_tasks_reach_the_other_tools():
    GlobalHydra.instance().clear()
    _, config, _ = read_settings(["task=[rows,equations]", "task.files.rows=a.jsonl"])
    assert (config.task.name, config.task.files) == (["rows", "equations"], {"rows": "a.jsonl"})


def test_runs_are_named_by_their_command_line():
    assert cli.run_name("") == "default"
    assert cli.run_name("diffusion.cart_p=0.1,optim.lr=2e-6") == "diffusion.cart_p-0.1__optim.lr-2e-6"
    long = "data.train_files=[" + "a" * 300 + "]"
    assert len(cli.run_name(long)) == 100
    assert cli.run_name(long) != cli.run_name(long + "b")


def test_train_sample_evaluate(script, tmp_path):
    code, out, err = script("train.py", "trainer.experiment_name=run", *SMALL)
    assert code == 0, err
    assert "loss" in out
    assert "tokens/s" in out
    model = "model.path=outputs/run/hf"
    quick = ["sampling.max_new_tokens=4", "sampling.steps=2"]

    code, out, err = script("sample.py", model, "prompt=Solve 3x+5=20", *quick)
    assert code == 0, err

    (tmp_path / "in.jsonl").write_text('{"question": "Solve 3x+5=20", "id": 7}\n{"question": "Hi"}\n')
    code, _, err = script("sample.py", model, "input=in.jsonl", "output=out.jsonl", *quick)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == ["Solve 3x+5=20", "Hi"]
    assert rows[0]["id"] == 7
    assert all(row["nfe"] == 2 for row in rows)
    assert script("sample.py", model, "prompt=What is ${x}?", *quick)[0] == 0
    alone = script("sample.py", model, "prompt=Solve 3x+5=20", *quick)[1]
    assert alone == rows[0]["response"] + "\n"

    code, out, err = script("evaluate.py", model, "trainer.experiment_name=run", *quick)
    assert code == 0, err
    assert "  0 of 550 " in out
    record = json.loads((tmp_path / "outputs" / "run" / "evaluation.json").read_text())
    assert record["scores"]["equations"]["questions"] == len(record["answers"]["equations"]) >= 200
    assert record["config"]["sampling"]["steps"] == 2
    assert record["versions"].keys() == {"diffllm", "torch", "transformers", "numpy", "python", "commit"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prompt=Hi"], ["model.path is not given"]),
        ([], ["prompt=", "input=FILE.jsonl output=FILE.jsonl"]),
        (["prompt=Hi", "input=a.jsonl"], ["or input="]),
        (["input=a.jsonl"], ["output=FILE.jsonl"]),
        (["input=a.jsonl", "output=b.jsonl"], ["a.jsonl", "no such file or folder"]),
        (["prompt=Hi", f"model.path={GOLDEN / 'dream_tiny'}"], ["no tokenizer files"]),
        (["prompt=Hi", "model.path=Dream-org/Dream-v0-Base-7B"], ["no directory", "hub", "hf download"]),
        (["prompt=Hi", "model.path=nowhere.gguf"], ["model.path=nowhere.gguf: no such file"]),
        (["prompt=Hi", f"model.path={GOLDEN / 'dream_tiny'}/x/y"], ["dream_tiny/x/y: no such directory"]),
    ],
    ids=str,
)
def test_mistakes_of_sampling_end_in_one_line(script, arguments, words):
    assert_one_error(script("sample.py", *arguments), *words)


def test_a_prompt_that_does_not_fit_the_context(script):
    script("train.py", "trainer.experiment_name=run", *SMALL)
    model = "model.path=outputs/run/hf"
    assert_one_error(script("sample.py", model, "prompt=Hi", "sampling.max_new_tokens=2048"), "context of 2048")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("defaults:\n  - override /model: dream_7c\n", ["dream_7c", "dream_7b"]),
        ("defaults:\n  - override /modle: tiny\n", ["modle"]),
        ("optim:\n  lr: [1\n", ["mine.yaml"]),
    ],
    ids=["choice", "group", "syntax"],
)
def test_mistakes_in_a_yaml_file_end_in_one_line(script, monkeypatch, tmp_path, text, words):
    (tmp_path / "more" / "experiment").mkdir(parents=True)
    (tmp_path / "more" / "experiment" / "mine.yaml").write_text("# @package _global_\n" + text)
    monkeypatch.setattr(cli, "check_arguments", lambda arguments: None)
    searchpath = f"hydra.searchpath=[file://{tmp_path / 'more'}]"
    assert_one_error(script("train.py", searchpath, "experiment=mine"), *words)


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch"])
def test_launch_scripts_are_valid_bash(name):
    subprocess.run(["bash", "-n", ROOT / "launch" / name], check=True)


@pytest.mark.slow
def test_local_sh_trains_on_the_cpu(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [ROOT / "launch" / "local.sh", ROOT / "train.py", "trainer.experiment_name=run", *SMALL]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "outputs/run/checkpoints/step_00000003/checkpoint.json").read_text())
    assert manifest["ranks"] == 1
    assert (tmp_path / "outputs/run/hf/model.safetensors").is_file()


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PUBLISHED = (
    "data.micro_batch_size_per_gpu=4 data.max_length=2048 trainer.total_epochs=3 data.gradient_accumulation_steps=2 "
    "model.enable_gradient_checkpointing=True data.enable_perbatch_cutoff=True "
    "data.perbatch_cutoff_type=random_with_input_pad trainer.val_check_interval=500"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "arguments"),
    [
        (TORCHRUN, "optim.lr=2e-6 diffusion.time_reweighting=cart"),
        ([*TORCHRUN, "--nproc_per_node=2"], PUBLISHED),
        ([sys.executable], "-m optim.lr=1e-6,2e-6,5e-6 trainer.total_epochs=2,3,5"),
    ],
    ids=["torchrun", "published", "sweep"],
)
def test_the_command_lines_people_know(start, arguments, tmp_path):
    command = [*start, ROOT / "train.py", *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = list(tmp_path.glob("outputs/*")) + list(tmp_path.glob("multirun/*/[0-9]"))
    assert len(runs) == (9 if "-m" in arguments else 1)
    for run in runs:
        assert (run / "hf" / "model.safetensors").is_file()
        assert metrics(run)[-1]["val/elbo"] > 0


@pytest.fixture
def own_choices(tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "small.yaml").write_text(
        "# @package _global_\noptim:\n  lr: 0.25\ntrainer:\n  experiment_name: small\n"
    )
    return tmp_path / "mine"


def test_own_choices_in_a_folder(script, tmp_path, monkeypatch):
    (tmp_path / "mine" / "sampling" / "dream_base").mkdir(parents=True)
    (tmp_path / "mine" / "sampling" / "dream_base" / "own.yaml").write_text("steps: 7\n")
    chosen = []
    monkeypatch.setattr(evaluate, "evaluate", chosen.append)
    assert script("evaluate.py", "--config-dir=mine", "sampling=dream_base/own")[0] == 0
    assert chosen[0].sampling.steps == 7
    assert_one_error(script("evaluate.py", "--config-dir=mine", "sampling=own"), "did you mean dream_base/own?")


def test_a_directory_of_own_choices(script, own_choices, tmp_path):
    code, out, err = script("train.py", "--config-dir", str(own_choices), "experiment=small", *SMALL)
    assert code == 0, err
    assert "lr 0.25" in out
    assert (tmp_path / "outputs" / "small" / "hf").is_dir()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config-dir", "nowhere", "experiment=small"], ["--config-dir nowhere", "no such directory"]),
        (["experiment=small"], ["experiment=small: no such choice"]),
        (["--config-dir=mine", "experiment=smal"], ["experiment=smal", "small"]),
        (
            ["optim.lr=1", "--config-dir", "clash", "experiment=lora"],
            ["clash/experiment/lora.yaml", "would be ignored"],
        ),
        (["--config-dir", "bare", "experiment=own"], ["# @package _global_"]),
    ],
    ids=str,
)
def test_mistakes_with_own_choices(script, own_choices, tmp_path, arguments, words):
    for name in ("clash/experiment/lora", "bare/experiment/own"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / f"{name}.yaml").write_text("optim:\n  lr: 1\n")
    assert_one_error(script("train.py", *arguments), *words)
