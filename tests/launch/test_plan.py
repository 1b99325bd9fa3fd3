"""Predicted memory against what a process takes, and what a user types and reads."""

import runpy
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from diffllm import ModelConfig, new_model
from diffllm.adapt import adapt
from diffllm.tokenizer import builtin_tokenizer
from launch.activations import pass_memory
from launch.cli import CONF
from launch.plan import largest_micro_batch, memory_table, meta_model, read_arguments
from tests.benchmarks.measure import peak_bytes
from tests.conftest import GOLDEN, small_shape
from tests.diffllm.decoders import write_decoder
from trainer.config import Config, batch_layout
from trainer.parallel import recompute_activations

COMMAND = ["model=dream_7b", "gpus=8", "gpu_memory=80", "data.max_length=2048", "data.micro_batch_size_per_gpu=4"]
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
def peaks():
    """Memory of each shape, measured in a process that returns freed memory at once."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as process:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        return dict(zip(SHAPES, process.map(measured, SHAPES.values()), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("name", SHAPES)
def test_predicted_is_measured(peaks, name):
    config = configured(SHAPES[name])
    with torch.device("meta"):
        model = new_model(config.model, builtin_tokenizer())
    kept, loss, backward = pass_memory(model, config, ROWS, torch.float32)
    assert peaks[name] > 150 * 2**20
    assert kept + max(loss, backward) == pytest.approx(peaks[name], rel=0.15)


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
    for row in ("weights", "gradients", "optimizer", "gathered weights", "activations", "logits"):
        assert f"\n{row} " in out
    # 16 bytes of state a parameter, less the gradients until they are there.
    state = 16 * 7.616e9 / 8 / 2**30
    assert all(0.75 * state < total < 0.75 * state + 12 for total in totals(out))
    assert f"fits: {max(totals(out)):.2f} of 72.00 GiB" in out
    assert "gpu_memory=80 less 10%" in out
    assert "largest micro-batch that fits: 5" in out
    assert "mfu=0.4, tflops=989" in out


def test_what_does_not_fit_is_told_what_helps(run):
    code, out, _ = run("model=llada_8b", "gpus=4", "gpu_memory=24", "model.enable_gradient_checkpointing=false")
    assert code == 1
    assert "8.02 billion parameters" in out
    assert "does not fit" in out
    assert "largest micro-batch that fits: none" in out
    [helps] = [line for line in out.splitlines() if line.startswith("what helps")]
    for setting in ("more GPUs", "enable_gradient_checkpointing", "lora_rank", "adamw_8bit", "cpu_offload"):
        assert setting in helps


def test_a_smaller_micro_batch_helps(run):
    code, out, _ = run(*COMMAND, "gpu_memory=24", "data.micro_batch_size_per_gpu=8")
    assert code == 1
    [largest] = [line.split()[-1] for line in out.splitlines() if line.startswith("largest")]
    assert f"what helps: data.micro_batch_size_per_gpu={largest}, more GPUs" in out


# In billions, as published.
PARAMETERS = {
    **dict.fromkeys(("dream_7b", "dream_7b_instruct", "dream_coder_7b", "dream_coder_7b_instruct"), 7.62),
    **dict.fromkeys(("diffucoder_7b", "diffucoder_7b_instruct", "qwen2_5_7b"), 7.62),
    **dict.fromkeys(("llada_8b", "llada_8b_instruct", "llada_1_5"), 8.02),
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


def test_a_causal_directory_is_planned_as_it_is_adapted(tmp_path, tokenizer):
    source = write_decoder("qwen2", tmp_path, tokenizer, vocab_size=len(tokenizer))
    _, config, _ = read_arguments([f"model.path={source}", "model.mask_token=NOISE", "data.max_length=64"])
    planned, adapted = meta_model(config, "tiny")[0], adapt(source, "NOISE")[0]
    shapes = [{name: weight.shape for name, weight in model.named_parameters()} for model in (planned, adapted)]
    assert planned.vocab_size == len(tokenizer) + 1
    assert shapes[0] == shapes[1]


def test_time_follows_mfu_and_gpus(run):
    small = ("model.num_hidden_layers=1", "tflops=1e-3")
    seconds = [
        float(run(*small, *more)[1].splitlines()[-1].split()[0]) for more in ([], ["mfu=0.2"], ["gpus=1", "mfu=0.2"])
    ]
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=1e-3)
    assert seconds[2] == seconds[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpu=8"], ["gpu=8: no such setting; did you mean gpus"]),
        (["--help"], ["NAME=VALUE"]),
        (["gpus=0"], ["gpus=0", "positive"]),
        (["gpus=2.5"], ["gpus", "2.5"]),
        (["gpu_memory=-1"], ["gpu_memory=-1", "positive"]),
        (["mfu=40"], ["mfu=40.0", "(0, 1]"]),
        (["optim.lrr=1"], ["optim.lrr", "did you mean optim.lr"]),
        (["model=dream_7c"], ["did you mean dream_7b"]),
        (["model.path=nowhere"], ["model.path=nowhere", "Dream-org/Dream-v0-Base-7B"]),
        (["experiment=adapt_ar", "model.path=Qwen/Qwen2.5-3B"], ["model.path=Qwen/Qwen2.5-3B", "SmolLM2", "shape"]),
        (["model=llada_8b", "data.max_length=8192"], ["data.max_length=8192", "context is 4096"]),
        (["data.train_batch_size=9"], ["train_batch_size=9", "ranks=8"]),
        (["trainer.replicate=3"], ["trainer.replicate=3", "gpus=8"]),
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
