"""Sampling settings that come with a checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import GenerationConfig

from diffllm.generation_config import generation_json, recommended_sampling
from sampling import SamplingConfig
from tests.conftest import GOLDEN
from tests.launch.test_cli import script  # noqa: F401 — a fixture
from trainer.config import Config

MINE = SamplingConfig(max_new_tokens=7, temperature=0.5, alg="maskgit_plus", stop=["a\\n"], batch_size=3, seed=5)


@pytest.fixture
def sampled(script, monkeypatch):  # noqa: F811
    """The sampling settings of sample.py with some arguments, and what it printed on stderr."""
    import sample

    def run(*arguments: str) -> tuple[SamplingConfig, str]:
        configs: list[Config] = []
        monkeypatch.setitem(sample.MODES, "answer", configs.append)
        code, _, err = script("sample.py", *arguments)
        assert code == 0, err
        return configs[0].sampling, err

    return run


@pytest.fixture
def checkpoint(tmp_path):
    shutil.copytree(GOLDEN / "dream_tiny", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(generation_json({"eos_token_id": 3, "alg": "origin", "top_k": 4}, {}, MINE)))
    return tmp_path / "model"


def test_a_checkpoint_brings_its_settings(sampled, checkpoint):
    config, err = sampled(f"model.path={checkpoint}")
    assert config == SamplingConfig(max_new_tokens=7, temperature=0.5, alg="maskgit_plus", stop=["a\\n"])
    assert f"{checkpoint}/generation_config.json" in err
    assert "sampling.temperature=0.5" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sampling.temperature=0"], {"temperature": 0.0, "max_new_tokens": 7}),
        (["~sampling.max_new_tokens"], {"temperature": 0.5, "max_new_tokens": 256}),
        (["sampling=default"], {"temperature": 0.0, "max_new_tokens": 256}),
        (["sampling=fast"], {"temperature": 0.0, "max_new_tokens": 256, "cache": "dual"}),
        (["sampling=llada_instruct/math"], {"temperature": 0.0, "max_new_tokens": 512, "eos_confidence": "suppress"}),
        (["experiment=quickstart"], {"temperature": 0.5, "max_new_tokens": 18}),
    ],
)
def test_the_command_line_wins(sampled, checkpoint, arguments, expected):
    config, _ = sampled(f"model.path={checkpoint}", *arguments)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(("name", "temperature"), [("dream_tiny", 0.2), ("llada_tiny", 0.0)])
def test_a_published_family_has_its_choice(sampled, name, temperature):
    config, err = sampled(f"model.path={GOLDEN / name}")
    assert config.temperature == temperature
    assert (config.block_length, config.transfer) == ((None, "linear") if name == "dream_tiny" else (32, "even"))
    assert "conf/sampling/" in err


def test_what_is_kept_and_read_back(tmp_path):
    kept = generation_json({"cache_implementation": "static", "temperature": 1.0, "top_k": 4}, {"bos": None}, MINE)
    assert recommended_sampling(kept)["stop"] == ["a\\n"]
    assert not {"seed", "batch_size", "compile", "top_k", "bos", "cache_implementation"} & kept.keys()
    assert SamplingConfig(**recommended_sampling(kept)) == SamplingConfig(
        max_new_tokens=7, temperature=0.5, alg="maskgit_plus", stop=["a\\n"]
    )
    assert recommended_sampling({"temperature": 0.6, "top_p": 0.9}) == {}  # of autoregressive decoding
    (tmp_path / "generation_config.json").write_text(json.dumps(kept))
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.5


def test_a_wrong_value_is_named(script, checkpoint):  # noqa: F811
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({"alg": "entropi"}))
    code, _, err = script("sample.py", f"model.path={checkpoint}", "prompt=hi")
    assert code == 1
    assert "generation_config.json" in err
    assert "sampling.alg=entropi" in err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alg": "${oc.env:HOME}"}, ["alg", "must be a name or a number"]),
        ({"alg": "entropy", "max_new_tokens": "${seed}"}, ["max_new_tokens"]),
        ({"alg": "entropy", "stop": [1]}, ["stop=[1]", "list of texts"]),
        ({"alg": "entropy", "temperature": float("nan")}, ["sampling.temperature=nan"]),
    ],
)
def test_values_of_strangers_are_data(script, checkpoint, settings, words):  # noqa: F811
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    code, _, err = script("sample.py", f"model.path={checkpoint}", "prompt=hi")
    assert code == 1
    for word in words:
        assert word in err
    assert str(Path.home()) not in err


def test_texts_of_strangers_are_texts(sampled, checkpoint):
    settings = {"alg": "entropy", "alg_temp": None, "stop": ["${oc.env:HOME}", "${", "\\n"]}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    config, _ = sampled(f"model.path={checkpoint}")
    assert config.stop == ["${oc.env:HOME}", "${", "\\n"]
