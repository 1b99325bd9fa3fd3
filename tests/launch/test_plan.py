"""Predicted memory against what a process takes, and what a user types and reads."""

import runpy
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from diffllm import ModelConfig, new_model
from diffllm.adapt import adapt
from diffllm.diffusion.objective import settings_of
from diffllm.tokenizer import builtin_tokenizer
from launch import CONF
from launch.activations import needs_mask, pass_memory
from launch.plan import largest_micro_batch, memory_table, read_arguments
from launch.shapes import meta_model
from tests.benchmarks.measure import peak_bytes
from tests.conftest import GOLDEN, small_shape
from tests.diffllm.decoders import write_decoder
from tests.diffllm.test_gguf import write_gguf
from trainer.config import Config, batch_layout
from trainer.parallel import recompute_activations
from trainer.speed import GPUS

COMMAND = ["model=dream_7b", "gpus=8", "gpu=h100", "data.max_length=2048", "data.micro_batch_size_per_gpu=4"]
ROWS, LENGTH = 4, 256
RECOMPUTED = {"hidden_size": 128, "num_key_value_heads": 2, "vocab_size": 2000, "enable_gradient_checkpointing": True}
# Shapes whose peak is in activations of many layers, logits, or a recomputed layer.
SHAPES = {
    "layers": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_key_value_heads": 2},
    "logits": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 50_000},
    "full": RECOMPUTED | {"intermediate_size": 9000, "num_hidden_layers": 3, "family": "llada"},
    "selective": RECOMPUTED | {"intermediate_size": 2048, "num_hidden_layers": 8, "recompute": "selective"},
}


def configured(shape: dict) -> Config:
    config = Config(model=ModelConfig(**shape))
    config.data.max_length = LENGTH
    return config


def measured(shape: dict) -> int:
    """Bytes that forward and backward pass of a batch with padded rows take beyond weights and gradients."""
    torch.set_num_threads(1)
    config = configured(shape)
    model = new_model(config.model, builtin_tokenizer()).train()
    recompute_activations(model, config.model)
    tokens, masked = torch.randint(1000, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH, dtype=torch.bool)
    attended = torch.ones_like(tokens)
    attended[1:, :9] = 0
    batch = (tokens, tokens, masked, torch.rand(ROWS, LENGTH), attended, attended.cumsum(-1))
    return peak_bytes(lambda: model(*batch).loss.backward())


@pytest.fixture(scope="module")
def peak():
    """Measures the memory of a shape in a process that returns freed memory at once."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as process:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        yield lambda name: process.submit(measured, SHAPES[name]).result()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("name", SHAPES)
def test_predicted_is_measured(peak, name):
    config = configured(SHAPES[name])
    with torch.device("meta"):
        model = new_model(config.model, builtin_tokenizer())
    kept, loss, backward = pass_memory(model, config, ROWS, torch.float32)
    taken = peak(name)
    assert taken > 150 * 2**20
    assert kept + max(loss, backward) == pytest.approx(taken, rel=0.15)


@pytest.fixture
def run(monkeypatch, capsys):
    """The exit code, stdout and stderr of `python -m launch.plan`."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan", *arguments])
        monkeypatch.delitem(sys.modules, "launch.plan", raising=False)
        with pytest.raises(SystemExit) as exit:
            runpy.run_module("launch.plan", run_name="__main__")
        return exit.value.code, *capsys.readouterr()

    return command


def totals(out: str) -> list[float]:
    [line] = [line for line in out.splitlines() if line.startswith("total")]
    return [float(number) for number in line.split()[1:]]


def test_a_plan(run):
    code, out, err = run(*COMMAND)
    assert (code, err) == (0, "")
    assert "7.62 billion parameters, shape from launch/shapes.yaml" in out
    assert "gpus=8 of gpu=h100: gpu_memory=80 GiB, tflops=989" in out
    assert "GiB on each GPU" in out
    for row in ("weights", "gradients", "optimizer", "gathered weights", "activations", "logits"):
        assert f"\n{row} " in out
    # 16 bytes of state a parameter, less the gradients until they are there.
    state = 16 * 7.616e9 / 8 / 2**30
    assert all(0.75 * state < total < 0.75 * state + 12 for total in totals(out))
    assert f"fits: {max(totals(out)):.1f} GiB of 72.0 GiB" in out
    assert "gpu_memory=80 less 10%" in out
    assert "largest micro-batch that fits: 56" in out
    assert "mfu=0.4" in out
    assert (
        "disk: 270 GiB at most: 3 × 85.1 GiB for checkpoints (2 are kept), 14.2 GiB for hf/"
        in run(*COMMAND, "trainer.save_checkpoint_steps=5", "trainer.max_steps=20")[1]
    )


def helps(out: str) -> dict[str, tuple[str, str]]:
    """What helps: need and verdict by setting."""
    lines = out.partition("what helps")[2].partition("\n\n")[0].splitlines()[1:]
    return {line.split("  ")[0]: tuple(part.strip() for part in line.split("  ")[1:] if part) for line in lines}


def test_what_does_not_fit_is_told_what_helps_and_what_suffices(run):
    code, out, _ = run("experiment=dream_s1k", "gpu=4090")
    assert code == 1
    assert "does not fit: 126 GiB of 21.6 GiB" in out
    assert "largest micro-batch" not in out
    found = helps(out)
    assert found["gpus=16"] == ("20.0 GiB", "fits")
    assert found["trainer.cpu_offload=true"][1].startswith("fits, with ")
    for setting in ("model.lora_rank=16 optim.lr=1e-4", "data.max_length=8192"):
        assert found[setting][1] == "lower"
    assert not any("checkpointing" in setting or "micro_batch" in setting for setting in found)  # no room in them


@pytest.mark.slow
def test_what_does_not_lower_the_peak_is_not_named(run):
    """Two ranks would gather weights that one rank keeps."""
    small = ["model.hidden_size=64", "model.lora_rank=1", "data.max_length=8", "gpu_memory=1e-4", "model.compile=false"]
    found = helps(run(*small)[1])
    assert found["all of these"][1].startswith("lower")
    assert found["model.quantize=nf4"][1] == "lower"
    assert not any(setting.startswith("gpus") for setting in found)


@pytest.mark.slow
def test_a_smaller_micro_batch_helps_that_divides_the_batch(run):
    command = [*COMMAND, "gpu=4090", "data.micro_batch_size_per_gpu=32"]
    code, out, _ = run(*command)
    assert code == 1
    setting = "data.micro_batch_size_per_gpu=2 data.gradient_accumulation_steps=16"  # the same step
    assert helps(out)[setting] == ("21.1 GiB", "fits")
    assert helps(out)["gpus=16"][1] == "lower"


def test_small_models_are_planned_in_mebibytes(run):
    _, out, _ = run("experiment=quickstart", "gpu=h100")
    assert "588,160 parameters" in out
    assert "MiB on each GPU" in out
    assert min(totals(out)) > 1
    assert "too little work to keep a GPU busy" in out
    assert "10.0 s for 2,000 steps: trainer.max_steps=2000" in out


# In billions, as published.
PARAMETERS = {
    **dict.fromkeys(("dream_7b", "dream_7b_instruct", "dream_coder_7b", "dream_coder_7b_instruct"), 7.62),
    **dict.fromkeys(("diffucoder_7b", "diffucoder_7b_instruct", "qwen2_5_7b", "fast_dllm_v2_7b"), 7.62),
    **dict.fromkeys(("llada_8b", "llada_8b_instruct", "llada_1_5"), 8.02),
    "sdar_8b_chat": 8.19,
    "qwen2_5_0_5b": 0.49,
    "qwen3_0_6b_base": 0.60,
    "llama3_2_1b": 1.24,
    "smollm2_135m_instruct": 0.13,
    "gemma3_1b": 1.00,
    "tiny": 0.00,
}


@pytest.mark.parametrize("choice", sorted(path.stem for path in CONF.glob("model/*.yaml")))
def test_every_model_has_a_shape_to_plan_with(choice):
    _, config, _ = read_arguments([f"model={choice}"])
    model, file = meta_model(config, choice)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(
        PARAMETERS[choice], abs=0.01
    )
    assert file == ("conf/model/tiny.yaml" if choice == "tiny" else "launch/shapes.yaml")


def test_a_directory_says_its_shape_itself(run):
    code, out, _ = run(f"model.path={GOLDEN / 'llada_tiny'}", "data.max_length=16", "model.lora_rank=2")
    assert code == 0
    assert f"shape from {GOLDEN / 'llada_tiny'}/config.json" in out


def test_rows_of_a_task_that_are_not_here_are_named(run):
    _, out, _ = run("model=tiny", "task=gsm8k", "gpu=4090")
    assert "(not on this machine: the rows of gsm8k)" in out


def test_a_causal_directory_is_planned_as_it_is_adapted(tmp_path, tokenizer):
    source = write_decoder("qwen2", tmp_path, tokenizer, vocab_size=len(tokenizer))
    _, config, _ = read_arguments([f"model.path={source}", "model.mask_token=NOISE", "data.max_length=64"])
    planned, adapted = meta_model(config, "tiny")[0], adapt(source, "NOISE")[0]
    shapes = [{name: weight.shape for name, weight in model.named_parameters()} for model in (planned, adapted)]
    assert planned.vocab_size == len(tokenizer) + 1
    assert shapes[0] == shapes[1]


def test_a_gguf_file_has_its_shape(tmp_path, tokenizer, run):
    source = write_decoder("qwen2", tmp_path / "source", tokenizer, vocab_size=260)
    file = write_gguf(AutoModelForCausalLM.from_pretrained(source), tmp_path)
    code, out, _ = run(
        f"model.path={file}", "model.mask_token='<|fim_pad|>'", "data.max_length=16", "model.compile=false"
    )
    assert code == 0
    assert f"shape from {file}" in out


def test_a_cached_checkpoint_of_the_hub_needs_no_shape(tmp_path, monkeypatch, run):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--dream"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(GOLDEN / "dream_tiny", repository / "snapshots" / ("0" * 40))
    code, out, _ = run("model.path=someone/dream", "data.max_length=16")
    assert code == 0
    assert "shape from someone/dream/config.json" in out


def test_the_help_explains_each_setting(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for name in ("gpu ", "gpus", "gpu_memory", "tflops", "mfu"):
        assert f"\n  {name}" in out
    assert all(name in out for name in GPUS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpu=8"], ["gpu=8", "4090", "gpu_memory="]),
        (["gpuz=8"], ["gpuz=8: no such setting; did you mean gpu"]),
        (["dream_s1k"], ["NAME=VALUE", "--help"]),
        (["gpus=0"], ["gpus=0", "positive"]),
        (["gpus=2.5"], ["gpus", "2.5"]),
        (["gpu_memory=-1"], ["gpu_memory=-1", "positive"]),
        (["mfu=40"], ["mfu=40.0", "(0, 1]"]),
        (["optim.lrr=1"], ["optim.lrr", "did you mean optim.lr"]),
        (["model=dream_7c"], ["did you mean dream_7b"]),
        (["model.path=nowhere"], ["model.path=nowhere", "Dream-org/Dream-v0-Base-7B"]),
        (["experiment=adapt_ar", "model.path=Qwen/Qwen2.5-3B"], ["model.path=Qwen/Qwen2.5-3B", "SmolLM2", "shape"]),
        (["model=llada_8b", "data.max_length=8192"], ["data.max_length=8192", "context is 4096"]),
        (["data.train_batch_size=9", "gpus=8"], ["train_batch_size=9", "ranks=8"]),
        (["data.train_batch_size=4096", "data.micro_batch_size_per_gpu=1"], ["train_batch_size=4096", "training rows"]),
        (["trainer.replicate=3", "gpus=8"], ["trainer.replicate=3", "gpus=8"]),
    ],
    ids=str,
)
def test_mistakes_end_in_one_error(run, arguments, words):
    code, _, err = run(*arguments)
    assert code == 1
    [line] = err.strip().splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words)


@pytest.fixture
def meta():
    config = Config(model=small_shape(hidden_size=256, num_hidden_layers=8, vocab_size=70_000, compile="false"))
    with torch.device("meta"):
        return new_model(config.model, builtin_tokenizer()), config, batch_layout(config.data, 0, 4)


@pytest.mark.slow
def test_the_largest_micro_batch_fits(meta):
    model, config, layout = meta
    usable = 8 * 2**30
    largest = largest_micro_batch(model, config, layout, usable)
    fitting, beyond = (
        max(memory_table(model, config, replace(layout, micro_batch_size=rows))["total"])
        for rows in (largest, round(1.1 * largest))
    )
    assert fitting <= usable < beyond
    assert largest_micro_batch(model, config, layout, 1000) == 0


def test_compiled_layers_keep_less(meta):
    """Not the norms, rotated queries and gates, which are computed again; with whole layers recomputed, the same."""
    model, config, layout = meta
    kept = {}
    for compile in ("false", "auto", "true"):
        config.model.compile = compile
        with torch._dynamo.config.patch(recompile_limit=1):  # earlier calls do not count
            kept[compile] = memory_table(model, config, layout)["activations"][0]
    assert kept["auto"] == kept["true"] < 0.8 * kept["false"]
    config.model.enable_gradient_checkpointing = True
    assert memory_table(model, config, layout)["activations"][0] < kept["auto"] / 4
    config.model.recompute = "selective"
    assert memory_table(model, config, layout)["activations"][0] == kept["auto"]


def test_settings_move_memory(meta):
    model, config, layout = meta
    plain = memory_table(model, config, layout)
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    for reduced, gradients in ((True, whole // 4), (False, whole)):
        config.trainer.reduce_each_micro_batch = reduced
        assert memory_table(model, config, replace(layout, micro_batches=2))["gradients"][0] == gradients
    model.lm.set_attn_implementation("eager")
    assert memory_table(model, config, layout)["activations"][0] > 2 * plain["activations"][0]  # keeps L×L scores
    config.model.enable_gradient_checkpointing = True
    assert memory_table(model, config, layout)["activations"][0] < plain["activations"][0] / 4
    config.trainer.cpu_offload = True
    assert memory_table(model, config, layout)["optimizer"] == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("diffusion", "attention", "annealed", "packed", "masked"),
    [
        ("masked", "auto", 0, True, False),
        ("masked", "sdpa", 0, False, False),
        ("masked", "sdpa", 0, True, True),
        ("masked", "auto", 10, False, True),
        ("causal", "auto", 0, True, False),
        ("causal", "sdpa", 0, False, True),
        ("block", "varlen", 0, False, False),
        ("block", "sdpa", 0, False, True),
    ],
)
def test_masks_of_all_pairs_are_counted(meta, diffusion, attention, annealed, packed, masked):
    model, config, _ = meta
    config.diffusion = settings_of(diffusion)()
    config.diffusion.attention_annealing_steps = annealed
    config.model.attn_implementation, config.data.packing = attention, packed
    config.data.max_length = 512
    assert needs_mask(config) is masked
    kept = pass_memory(model, config, 2, torch.bfloat16).kept
    config.diffusion.attention_annealing_steps, config.data.packing = 0, False
    config.model.attn_implementation = "auto"
    width = 512 * config.diffusion.copies
    assert (kept - pass_memory(model, config, 2, torch.bfloat16).kept >= 2 * 2 * width**2) is masked
