"""Broken checkpoints, by the hundred: a clear error, or a model of the shape that config.json says."""

import json
import shutil

import numpy as np
import pytest

from diffllm import load_model
from diffllm.loading import empty_model
from tests.conftest import GOLDEN, no_longer_than
from tests.data.test_fuzz import STRANGE, broken_bytes

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
