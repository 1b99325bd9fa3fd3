"""python -m launch.verify: a sound run is green, and each fault turns its check red or yellow."""

import copy
import json
import re
import runpy
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Lowercase

from diffllm.diffusion.causal import CausalConfig
from diffllm.generate import Response
from launch.checks import CHECKS, machine, model
from launch.checks.base import Check, Run
from launch.settings import read_settings
from launch.verify import explanations, results_of, run_checks
from tests.conftest import ROOT
from tests.data.rows import row, write
from trainer.distributed import Distributed, init_distributed

TINY = [
    *("data.max_length=64", "data.train_batch_size=8", "sampling.max_new_tokens=18", "trainer.max_steps=30"),
    *("model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1", "model.num_attention_heads=2"),
    *("model.num_key_value_heads=2", "optim.lr=1e-2"),
]


@pytest.fixture
def distributed():
    with init_distributed() as alone:
        yield alone


@pytest.fixture
def results(distributed, small_run):
    """Results of one check of a small run, whose parts a function may change first."""

    def of(name, change=lambda run: None, train=True, **settings):
        run = Run(small_run(**settings), "tiny", distributed, train=train)
        change(run)
        return [result for _, result in results_of(CHECKS[name], run)]

    return of


@pytest.fixture
def one(results):
    """The worst result of one check."""
    order = ("skip", "ok", "warn", "FAIL")
    return lambda *args, **settings: max(results(*args, **settings), key=lambda result: order.index(result.status))


@pytest.fixture
def changed_checkpoint(default_run, tmp_path):
    """Makes a copy of a trained checkpoint with other weights."""

    def copied(change):
        directory = shutil.copytree(default_run / "hf", tmp_path / "hf")
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
        return str(directory)

    return copied


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """The exit code and stdout of `python -m launch.verify` in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["verify", *arguments])
        monkeypatch.delitem(sys.modules, "launch.verify", raising=False)
        with pytest.raises(SystemExit) as exit:
            runpy.run_module("launch.verify", run_name="__main__")
        return exit.value.code, capsys.readouterr().out

    return run


def test_a_sound_run_is_green_and_writes_nothing(command, tmp_path):
    code, out = command(*TINY, "tokens=3")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert {line[0] for line in lines if line and line[0] in ("ok", "warn", "FAIL", "skip")} == {"ok"}
    assert all(re.search(rf"^ok +{name} ", out, re.MULTILINE) for name in CHECKS)
    assert ["2", "'\\n'", "prompt", "no", "no"] in lines
    assert "more positions" in out
    assert f"next: launch/local.sh train.py {TINY[0]}" in out
    assert "tokens=3" not in out
    assert list(tmp_path.iterdir()) == []


def test_a_red_check_ends_in_1_and_skips_those_that_need_it(command):
    code, out = command("model.path=nowhere")
    assert code == 1
    status = dict(reversed(line.split()[:2]) for line in out.splitlines() if re.match("ok|FAIL|skip", line))
    assert [status[name] for name in ("packages", "shape", "memory", "memorising")] == ["ok", "FAIL", "skip", "skip"]
    assert "help: the model is refused" in out
    assert "next:" not in out


def test_several_ranks_are_refused(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command() == (1, "")


@pytest.mark.parametrize("argument", ["tokens=-1", "train=maybe", "optim.lrr=1"])
def test_a_wrong_argument_ends_in_1(command, argument):
    assert command(argument) == (1, "")


def test_the_help_lists_the_checks(command):
    code, out = command("--help")
    assert code == 0
    assert explanations() in out
    assert all(re.search(rf"^  {name} +[A-Z]", out, re.MULTILINE) for name in CHECKS)


def test_every_check_answers_a_question_of_the_documentation():
    questions = (ROOT / "trainer/README.md").read_text().partition("## Questions")[2]
    rows = {cells[1].strip(): cells[2] for line in questions.splitlines() if len(cells := line.split("|")) > 3}
    for name, check in CHECKS.items():
        assert f"`{name}`" in rows[check.symptom]
        assert all(need in CHECKS for need in check.needs)


def test_a_lack_of_memory_in_any_check_names_what_helps(distributed, small_run):
    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore on this")
        yield

    [(symptom, result)] = results_of(Check(full, "another"), Run(small_run(), "tiny", distributed))
    assert (symptom, result.status) == ("out of memory", "FAIL")
    assert "model.enable_gradient_checkpointing=true" in result.advice
    assert "More" not in result.text


def test_sampling_is_that_of_the_checkpoint(default_run):
    path = default_run / "hf"
    settings = json.loads((path / "generation_config.json").read_text())
    arguments = [f"model.path={path}", "sampling.max_new_tokens=9"]
    sampling = read_settings(arguments, recommended=set())[1].sampling
    assert (sampling.max_new_tokens, sampling.alg) == (9, settings["alg"])


# packages, devices, settings, memory, disk


@pytest.mark.parametrize(
    ("settings", "package", "advice"),
    [
        ({}, "torch", "pip install -c constraints.txt 'torch>="),
        ({"model__lora_rank": 2}, "peft", ".[lora]"),
        ({"model__quantize": "nf4"}, "bitsandbytes", ".[quantize]"),
        ({"model__path": "model.gguf"}, "gguf", ".[gguf]"),
        ({"model__attn_implementation": "flash_attention_2"}, "flash-attn", ".[flash]"),
        ({"model__loss_kernel": "liger"}, "liger-kernel", ".[liger]"),
        ({"optim__name": "adamw_8bit"}, "torchao", ".[torchao]"),
        ({"data__drop_duplicates": "near"}, "datasketch", ".[dedup]"),
        ({"trainer__logger": ["tensorboard"]}, "tensorboard", ".[tensorboard]"),
        ({"trainer__logger": ["trackio"]}, "trackio", ".[trackio]"),
    ],
)
@pytest.mark.parametrize("found", [None, "0.0.1"])
def test_a_missing_or_old_package(results, monkeypatch, settings, package, advice, found):
    def installed(name):
        if name != package:
            return "99"
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(machine, "version", installed)
    [result] = [result for result in results("packages", **settings) if f" {package}>=" in result.text]
    assert result.status == "FAIL"
    assert advice in result.advice


def test_a_gpu_that_torch_cannot_use(one, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(machine.Path, "glob", lambda *_: iter(["/dev/nvidia0"]))
    assert one("devices").status == "warn"


@pytest.mark.parametrize(("bf16", "status"), [(True, "ok"), (False, "FAIL")])
def test_a_gpu_without_the_precision_of_the_run(one, monkeypatch, bf16, status):
    card = SimpleNamespace(name="a card", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)

    def on_gpu(run):
        run.distributed = Distributed(0, 1, torch.device("cuda"))

    result = one("devices", on_gpu)
    assert result.status == status
    assert "a card of 24.0 GiB" in result.text


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("settings", {"data__train_batch_size": 9, "data__micro_batch_size_per_gpu": 4}, "train_batch_size=9"),
        ("settings", {"data__train_batch_size": 5000, "trainer__max_steps": None}, "320 training rows"),
        ("shape", {"model__vocab_size": 50}, "model.vocab_size=50"),
        ("shape", {"data__max_length": 4096}, "context is 2048"),
        ("checkpoint", {"model__path": "nowhere"}, "model.path=nowhere"),
        ("tokenizer", {"model__chat_template": "gemma"}, "model.chat_template=gemma"),
        ("rows", {"data__train_files": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ("rows", {"data__max_length": 20}, "data.max_length=20"),
        ("validation", {"data__val_files": [], "trainer__keep_best": True}, "trainer.keep_best"),
        ("validation", {"data__val_files": [], "trainer__val_samples": 2}, "trainer.val_samples=2"),
        ("validation", {"diffusion__attention_annealing_steps": 13}, "attention_annealing_steps=13"),
        ("weights", {"model__target_modules": ["w"], "model__lora_rank": 2}, "model.target_modules=[w]"),
        ("generation", {"sampling__max_new_tokens": 2040}, "sampling.max_new_tokens=2040"),
    ],
)
def test_what_a_run_would_refuse_is_red(one, name, settings, words):
    result = one(name, **settings)
    assert result.status == "FAIL"
    assert words in result.text


def test_a_run_that_does_not_fit_the_device(one, monkeypatch):
    monkeypatch.setattr(machine, "device_memory", lambda _: 2**20)
    result = one("memory")
    assert result.status == "FAIL"
    assert "model.enable_gradient_checkpointing=true" in result.advice


def test_a_full_disk(one, monkeypatch):
    monkeypatch.setattr(machine, "free_space", lambda _: (2**10, 0))
    result = one("disk")
    assert result.status == "FAIL"
    assert "trainer.output_dir" in result.advice


def test_a_directory_that_cannot_be_written(one, tmp_path):
    (tmp_path / "file").touch()
    result = one("disk", trainer__output_dir=str(tmp_path / "file" / "run"))
    assert result.status == "FAIL"
    assert f"{tmp_path / 'file'} is no directory" in result.text


# tokenizer, rows


def with_tokenizer(change):
    def changed(run):
        run.__dict__["tokenizer"] = copy.deepcopy(run.tokenizer)
        change(run.tokenizer)

    return changed


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("mask_token", "<|endoftext|>"), ("unk_token", "<|mask|>"), ("mask_token", "Ġ"), ("chat_template", None)],
)
def test_a_tokenizer_that_cannot_serve(one, attribute, value):
    """A mask that is the end, the unknown token, or read as other tokens; no chat template."""
    assert one("tokenizer", with_tokenizer(lambda each: setattr(each, attribute, value))).status == "FAIL"


def test_a_tokenizer_that_changes_texts(one):
    def lower(tokenizer):
        tokenizer.backend_tokenizer.normalizer = Lowercase()

    result = one("texts", with_tokenizer(lower))
    assert result.status == "warn"
    assert "'Solve" in result.text
    assert "'solve" in result.text


def files(tmp_path, *rows):
    return {"data__train_files": [write(tmp_path / "rows.jsonl", *rows)], "data__train_batch_size": 2}


def test_control_tokens_in_texts(one, tmp_path):
    result = one("texts", **files(tmp_path, row("Hi <|im_end|>"), row("Ho")))
    assert result.status == "warn"
    assert result.text.startswith("1 training rows")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data__max_length": 40, "data__truncation": "drop"}, "50% of the rows exceed data.max_length=40"),
        ({"data__max_length": 40, "data__truncation": "right"}, "2 responses are cut before their answer"),
        ({"data__on_bad_row": "skip"}, "1 rows cannot be used, such as"),
    ],
)
def test_rows_that_are_lost(results, tmp_path, settings, words):
    rows = [row("a", "b"), row("a", "b" * 100), row("a", "c"), row("a", "c" * 100)]
    if "data__on_bad_row" in settings:
        rows.append({"question": "no answer"})
    settings = {"data__max_length": 400} | files(tmp_path, *rows) | {"data__val_files": []} | settings
    [result] = [result for result in results("rows", **settings) if words in result.text]
    assert result.status == "warn"
    assert result.advice


def test_too_few_rows_are_left_for_a_batch(one, tmp_path):
    rows = [*[row("a")] * 5, *[row("a", "b" * 100)] * 3]
    settings = files(tmp_path, *rows) | {"data__train_batch_size": 8, "data__truncation": "drop"}
    result = one("rows", **settings)
    assert result.status == "FAIL"
    assert "data.train_batch_size=8" in result.text


def test_a_stream(distributed, small_run):
    run = Run(small_run(data__streaming=True, data__val_files=[]), "tiny", distributed, train=False)
    status = {name: result.status for name, _, result in run_checks(run)}
    skipped = dict.fromkeys(("canvas", "gradient", "generation", "memorising"), "skip")
    assert status == dict.fromkeys(CHECKS, "ok") | skipped | {"validation": "warn"}


def test_validation_rows(one, equations):
    assert one("validation").status == "ok"
    assert one("validation", data__val_files=[]).status == "warn"
    result = one("validation", data__val_files=equations.train_files)
    assert result.status == "warn"
    assert result.text.startswith("320 of 320 validation prompts")


@pytest.mark.parametrize("where", [False, True])
def test_an_objective_that_masks_nothing_or_the_prompt(one, where):
    def masked(run):
        for batch in run.micro_batches:
            batch["masked"] = torch.full_like(batch["masked"], where)

    result = one("batch", masked)
    assert result.status == "FAIL"
    assert result.details.row_count


def test_a_causal_run_masks_nothing_and_is_not_sampled(one):
    def causal(run):
        run.config.diffusion = CausalConfig()

    for name in ("canvas", "generation"):
        result = one(name, causal)
        assert (result.status, result.text) == ("skip", "answers of a causal model are not sampled by unmasking")
    assert re.match(r"0 of [1-9]\d* trained tokens are masked", one("batch", causal).text)
    assert one("first loss", causal).status == "ok"


def test_a_canvas_of_another_length_than_the_responses(one):
    assert one("canvas", sampling__max_new_tokens=20).status == "ok"
    assert "sampling.max_new_tokens=18" in one("canvas", sampling__max_new_tokens=2).advice
    assert one("canvas", sampling__max_new_tokens=65).status == "warn"


# the model


def spoil(weights, value):
    weights["model.layers.0.mlp.up_proj.weight"].fill_(value)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_weights_that_were_not_read(one, changed_checkpoint, value):
    result = one("weights", model__path=changed_checkpoint(lambda weights: spoil(weights, value)))
    assert result.status == "FAIL"
    assert "layers.0.mlp.up_proj.weight" in result.text


def test_a_weight_that_is_missing(one, changed_checkpoint):
    result = one("weights", model__path=changed_checkpoint(lambda weights: weights.pop("model.norm.weight")))
    assert result.status == "FAIL"
    assert "missing: model.norm.weight" in result.text


def test_a_checkpoint_of_an_unknown_kind(one, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert one("checkpoint", model__path=str(tmp_path)).status == "FAIL"


@pytest.mark.parametrize("name", ["weights", "gradient", "memorising"])
def test_a_model_that_is_too_large_is_skipped(one, monkeypatch, name):
    monkeypatch.setattr(model, "device_memory", lambda _: 2**10)
    result = one(name)
    assert result.status == "skip"
    assert "0.00" in result.text


@pytest.mark.parametrize("name", ["gradient", "memorising"])
def test_nothing_is_trained_if_that_is_switched_off(one, name):
    assert one(name, train=False) == ("skip", "train=false", None, None)


def test_a_model_that_stays_causal(one, monkeypatch):
    monkeypatch.setattr("diffllm.modeling_diffllm.switch_off_causality", lambda _: None)
    result = one("forward")
    assert result.status == "FAIL"
    assert "later token" in result.text


def with_nan(run):
    with torch.no_grad():
        run.model.lm.get_decoder().norm.weight.to_local()[0] = torch.nan


@pytest.mark.parametrize("name", ["weights", "forward", "first loss", "gradient", "memorising"])
def test_numbers_that_are_not_finite(one, name):
    assert one(name, with_nan).status == "FAIL"


def test_first_losses(one, default_run, changed_checkpoint):
    assert one("first loss").status == "ok"
    assert one("first loss", model__initializer_range=2.0).status == "warn"
    assert one("first loss", model__path=str(default_run / "hf")).status == "ok"
    worse = changed_checkpoint(lambda weights: weights["lm_head.weight"].mul_(-20))
    assert one("first loss", model__path=worse).status == "warn"


def test_a_parameter_that_the_loss_does_not_use(one):
    assert one("gradient").status == "ok"
    assert one("gradient", model__lora_rank=2).status == "ok"

    def unused(run):
        run.model.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))

    result = one("gradient", unused)
    assert (result.status, result.text) == ("FAIL", "no gradient: unused")


@pytest.mark.parametrize(("lr", "status"), [(1e-2, "ok"), (1e-6, "warn"), (1e3, "FAIL")])
def test_few_rows_are_memorised_unless_the_learning_rate_is_wrong(one, lr, status):
    result = one("memorising", optim__lr=lr)
    assert result.status == status
    assert status == "ok" or "optim.lr" in result.advice


@pytest.mark.parametrize(
    ("text", "ended", "words"),
    [("", True, "empty"), ("5555", True, "repeats one token"), ("Hello", False, "does not end"), ("x=5", True, None)],
)
def test_sampled_responses(one, monkeypatch, default_run, text, ended, words):
    monkeypatch.setattr(model, "generate", lambda *_: iter([Response(0, text, 4, 4, 1.0, ended)]))
    result = one("generation", model__path=str(default_run / "hf"))
    assert result.status == ("warn" if words else "ok")
    assert (words or text) in result.text
    assert one("generation").status == "ok"  # random weights mean nothing
