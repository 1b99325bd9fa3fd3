"""Broken checkpoints, by the hundred: a clear error in one line, or a model of the shape that config.json says."""

import json
import shutil

import numpy as np
import pytest

from diffllm import load_model
from diffllm.adapt import adapt
from diffllm.loading import empty_model
from diffllm.tokenizer import builtin_tokenizer, load_tokenizer, save_tokenizer
from tests.conftest import GOLDEN, no_longer_than
from tests.data.test_fuzz import STRANGE, broken_bytes
from trainer.parallel import read_weights

SECONDS = 30  # for one checkpoint
FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers", "mask_token_id", "eos_token_id", "model_type", "rope_theta")
FIELDS += ("num_attention_heads", "intermediate_size", "architectures", "hidden_act", "d_model", "n_layers", "n_heads")


@pytest.fixture(params=["dream_tiny", "llada_tiny"])
def copy(request, tmp_path):
    shutil.copytree(GOLDEN / request.param, tmp_path / request.param)
    return tmp_path / request.param


def loads(copy) -> bool:
    """Whether a checkpoint loads; if not, for a reason that names it."""
    error = None
    for load in (empty_model, load_model):
        try:
            with no_longer_than(SECONDS):
                model = load(copy)
        except ValueError as refusal:
            error = str(refusal)
        else:
            assert model.vocab_size == model.lm.get_input_embeddings().num_embeddings
    assert error is None or copy.name in error, error
    return error is None


def test_broken_configs(copy):
    whole = json.loads((copy / "config.json").read_text())
    outcomes = []
    for number in range(60):
        rng = np.random.default_rng(number)
        config = dict(whole)
        for field in rng.choice(FIELDS, size=rng.integers(1, 3)):
            if rng.random() < 0.3:
                config.pop(str(field), None)
            else:
                config[str(field)] = [*STRANGE, -1, 0, 3, 1.5, "gelu"][rng.integers(len(STRANGE) + 5)]
        content = json.dumps(config).encode()
        (copy / "config.json").write_bytes(broken_bytes(content, rng) if rng.random() < 0.3 else content)
        outcomes.append(loads(copy))
    assert outcomes.count(False) > 20


def test_broken_weights(copy):
    whole = (copy / "model.safetensors").read_bytes()
    outcomes = []
    for number in range(40):
        (copy / "model.safetensors").write_bytes(broken_bytes(whole, np.random.default_rng(number)))
        outcomes.append(loads(copy))
    assert outcomes.count(False) > 10


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
NESTED = b"[" * 100_000 + b"]" * 100_000
BROKEN = {
    "a pointer": (POINTER, "git lfs pull"),
    "null": (b"null", "not a JSON object"),
    "a list": (b"[1, 2]", "not a JSON object"),
    "a number": (b"3", "not a JSON object"),
    "text": (b'"a"', "not a JSON object"),
    "nothing": (b"", "not JSON"),
    "deep": (NESTED, "recursion"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "recursion"),
    "not UTF-8": (b'{"a": "\xe9"}', "utf-8"),
}


@pytest.fixture
def whole(tmp_path):
    """A checkpoint with its tokenizer."""
    shutil.copytree(GOLDEN / "dream_tiny", tmp_path / "whole")
    save_tokenizer(builtin_tokenizer(), tmp_path / "whole")
    return tmp_path / "whole"


def one_line(load, source):
    with no_longer_than(SECONDS), pytest.raises(ValueError, match=source.name) as error:
        load(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize(
    ("name", "loads"),
    [
        ("config.json", (load_model, empty_model, adapt)),
        ("generation_config.json", (load_model, empty_model)),
        ("model.safetensors.index.json", (load_model,)),
        ("tokenizer.json", (load_tokenizer,)),
        ("tokenizer_config.json", (load_tokenizer,)),
        ("special_tokens_map.json", (load_tokenizer,)),
        ("added_tokens.json", (load_tokenizer,)),
    ],
)
def test_a_json_file_that_is_none(name, loads, content, whole):
    written, reason = BROKEN[content]
    (whole / name).write_bytes(written)
    if "index" in name:
        (whole / "model.safetensors").unlink()
    for load in loads:
        said = one_line(load, whole)
        assert name in said
        assert reason in said


@pytest.mark.parametrize("content", [b"{}", b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'])
def test_a_tokenizer_that_lacks_parts(content, whole):
    (whole / "tokenizer.json").write_bytes(content)
    assert "tokenizer.json" in one_line(load_tokenizer, whole)


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("model.safetensors", load_model),
        ("model.safetensors", lambda source: read_weights(empty_model(source), str(source))),
        ("merges.txt", load_tokenizer),
        ("chat_template.jinja", load_tokenizer),
        ("model.gguf", lambda source: load_tokenizer(source / "model.gguf")),
        ("model.gguf", lambda source: adapt(str(source / "model.gguf"))),
    ],
)
def test_a_git_lfs_pointer(name, load, whole):
    (whole / name).write_bytes(POINTER)
    said = one_line(load, whole)
    assert name in said
    assert "git lfs pull" in said


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_directory_in_the_place_of_a_file(name, whole):
    (whole / name).unlink()
    (whole / name).mkdir()
    assert name in one_line(load_tokenizer if "token" in name else load_model, whole)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((key, value) for key in ("rope_scaling", "rope_parameters") for value in (3, "a", [1])),
        *(
            (key, {"rope_type": kind})
            for key in ("rope_scaling", "rope_parameters")
            for kind in ("linear", "yarn", "dynamic")
        ),
        *(("rope_scaling", {"type": "linear", "factor": factor}) for factor in (None, "x", 0, -1.0, True)),
        *(("rope_scaling", {"rope_type": kind, "factor": 2.0}) for kind in ("nope", 3, None)),
        ("rope_parameters", {"full_attention": {"rope_type": "linear"}}),
        *((key, float("nan")) for key in ("rope_theta", "rms_norm_eps", "hidden_size", "mask_token_id")),
        ("rope_theta", float("inf")),
        ("extra", {"a": [1.0, float("nan")]}),
        *(("model_type", value) for value in ([1], {}, 3)),
        *(("auto_map", value) for value in ([1], "x")),
        ("layer_types", "x"),
        ("num_attention_heads", 0),
    ],
    ids=str,
)
def test_values_that_config_json_cannot_have(field, value, whole):
    config = json.loads((whole / "config.json").read_text()) | {field: value}
    (whole / "config.json").write_text(json.dumps(config))
    for load in (load_model, empty_model):
        said = one_line(load, whole)
        assert "config.json" in said
        assert field in said or field == "num_attention_heads"


def test_rotary_frequencies_that_may_be(whole):
    config = json.loads((whole / "config.json").read_text())
    for rope in (
        {},
        {"rope_type": "default"},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 4},
    ):
        (whole / "config.json").write_text(json.dumps(config | {"rope_scaling": rope}))
        assert empty_model(whole).vocab_size == 256


@pytest.mark.parametrize("ends", ["x", [1, "x"], 1.5, True, {}])
def test_the_end_of_sequence_in_generation_config_json_is_a_token(ends, whole):
    (whole / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert "eos_token_id" in one_line(empty_model, whole)


CODE = {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}


@pytest.fixture
def says_yes(monkeypatch, whole):
    """A user who would let code run, and code that leaves a trace."""
    asked, trace = [], whole / "ran"
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    code = f"open({str(trace)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as OwnTokenizer\n"
    (whole / "own.py").write_text(code)
    yield
    assert not asked
    assert not trace.exists()


@pytest.mark.parametrize("model_type", ["Dream", "own"])
def test_a_tokenizer_of_its_own_code_does_not_run(model_type, whole, says_yes):
    (whole / "tokenizer_config.json").write_text(json.dumps(CODE))
    config = json.loads((whole / "config.json").read_text()) | {"model_type": model_type}
    (whole / "config.json").write_text(json.dumps(config))
    (whole / "tokenizer.json").unlink()
    said = one_line(load_tokenizer, whole)
    assert "remote code" in said or model_type == "Dream"


def test_code_beside_a_tokenizer_that_needs_none_does_not_run(whole, says_yes):
    saved = json.loads((whole / "tokenizer_config.json").read_text())
    (whole / "tokenizer_config.json").write_text(json.dumps(saved | {"auto_map": CODE["auto_map"]}))
    assert load_tokenizer(whole)("Hi")["input_ids"] == builtin_tokenizer()("Hi")["input_ids"]


@pytest.mark.parametrize("model_type", ["Dream", "qwen2", "own"])
def test_a_model_of_its_own_code_does_not_run(model_type, whole, says_yes):
    maps = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoModelForCausalLM": "own.Model"}
    config = json.loads((whole / "config.json").read_text())
    config |= {"auto_map": maps, "model_type": model_type, "architectures": None}
    (whole / "config.json").write_text(json.dumps(config))
    (whole / "custom_generate").mkdir()
    (whole / "custom_generate" / "generate.py").write_text((whole / "own.py").read_text())
    if model_type == "own":
        assert "model_type='own'" in one_line(load_model, whole)
    else:
        assert load_model(whole).vocab_size == 256
