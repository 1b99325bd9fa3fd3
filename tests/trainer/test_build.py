"""Model and tokenizer made to agree: mask, chat template, and what an export keeps of them."""

import json

import pytest
import torch

from data import BatchLayout, DataConfig, prompt_ids
from data.config import TaskConfig
from data.tasks.sudoku4 import Sudoku4
from diffllm import DiffusionConfig, ModelConfig, new_model
from diffllm.diffusion.masked import MaskedDiffusion
from diffllm.tokenizer import builtin_tokenizer, load_tokenizer
from tests.conftest import small_shape
from tests.diffllm.decoders import write_decoder
from tests.trainer.runs import losses, train, weights
from trainer.build import build_batches, build_model
from trainer.config import Config
from trainer.export import export


def test_variables_of_the_chat_template_go_into_the_export(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}{{ tone }}")
    config = small_shape(chat_template=str(tmp_path / "mine.jinja"), chat_template_kwargs={"tone": "!"})
    model, tokenizer = build_model(config)
    model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
    chat, path = [{"role": "user", "content": "Hi"}], str(tmp_path / "out")
    for each in (tokenizer, build_model(ModelConfig(path=path))[1]):
        assert each.apply_chat_template(chat, tokenize=False) == "Hi!"
    with pytest.raises(ValueError, match=r"model\.chat_template_kwargs=.*'tome'; did you mean tone"):
        build_model(ModelConfig(path=path, chat_template_kwargs={"tome": "?"}))


@pytest.fixture(params=["dream", "llada"])
def nameless(request, tmp_path):
    """A checkpoint whose tokenizer does not name its mask, as LLaDA's does not."""
    tokenizer = builtin_tokenizer()
    new_model(small_shape(family=request.param), tokenizer).save_pretrained(tmp_path / "source")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_the_tokenizer_names_the_mask_of_the_model(nameless, tmp_path):
    assert load_tokenizer(nameless).mask_token is None
    model, tokenizer = build_model(ModelConfig(path=str(nameless)))
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mask|>", model.mask_token_id)
    model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
    assert load_tokenizer(tmp_path / "out").mask_token == "<|mask|>"

    ids = prompt_ids([{"role": "user", "content": "What is <|mask|>?"}], tokenizer)
    assert "<|mask|>" in tokenizer.decode(ids)
    assert model.mask_token_id not in ids


def test_a_tokenizer_with_another_mask(nameless):
    tokenizer = load_tokenizer(nameless)
    tokenizer.mask_token = "<|im_start|>"
    tokenizer.save_pretrained(nameless)
    with pytest.raises(ValueError, match=r"has the mask '<\|im_start\|>', token 1254, but the model has token 1253"):
        build_model(ModelConfig(path=str(nameless)))


def test_a_mask_without_a_token_is_left_alone(tmp_path):
    new_model(small_shape(family="llada", vocab_size=1300), builtin_tokenizer()).save_pretrained(tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text()) | {"mask_token_id": 1299}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    tokenizer = builtin_tokenizer()
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "copy")
    model, tokenizer = build_model(ModelConfig(path=str(tmp_path / "copy")))
    assert (model.mask_token_id, tokenizer.mask_token) == (1299, None)


def test_a_chat_template_is_set_and_kept(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}!")
    for template, expected in ((str(tmp_path / "mine.jinja"), "Hi!"), ("chatml", "<|im_start|>user\nHi<|im_end|>\n")):
        model, tokenizer = build_model(small_shape(chat_template=template))
        model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
        chat = [{"role": "user", "content": "Hi"}]
        for each in (tokenizer, load_tokenizer(tmp_path / "out")):
            assert each.apply_chat_template(chat, tokenize=False) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("llama3", r"model\.chat_template=llama3: the tokenizer has no <\|begin_of_text\|>, <\|end_header_id\|>"),
        ("chatlm", r"model\.chat_template=chatlm: no such file; .* chatml, gemma, llada"),
    ],
)
def test_templates_that_cannot_serve(template, message):
    with pytest.raises(ValueError, match=message):
        build_model(small_shape(chat_template=template))


def test_training_adapts_the_same_on_one_rank_and_two(small_run, tmp_path, train_on_two_ranks):
    tokenizer = builtin_tokenizer()
    tokenizer.mask_token = None
    source = write_decoder("gemma3_text", tmp_path / "source", tokenizer, initializer_range=0.05)
    settings = {"model__path": str(source), "model__mask_token": "<|diffuse|>"}
    alone, on_two = train(small_run("alone", **settings)), small_run("two", **settings)
    train_on_two_ranks([on_two])
    assert losses(alone) == pytest.approx(losses(alone.parent / "two"), rel=1e-6)
    export(alone / "checkpoints" / "step_00000012", tmp_path / "half", "bf16")
    model, _ = build_model(ModelConfig(path=str(tmp_path / "half")))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in weights(alone).items():
        assert torch.equal(tensor.bfloat16().float(), model.lm.state_dict()[name])
    # An adapted checkpoint is read shard by shard.
    again = small_run("again", model__path=str(alone / "hf"), trainer__max_steps=1)
    whole = small_run("whole", model__path=str(alone / "hf"), trainer__max_steps=1, trainer__replicate=1)
    train_on_two_ranks([again])
    assert losses(alone.parent / "again") == pytest.approx(losses(train(whole)), rel=1e-6)


def test_an_unknown_type_of_export(tmp_path):
    with pytest.raises(ValueError, match=r"dtype=f16: .*bf16, f32"):
        export(tmp_path, tmp_path / "out", "f16")


def test_a_task_gives_the_training_rows(tmp_path, tokenizer):
    """Its problems that are test rows, or cannot be used, are counted in the report."""
    rows = list(Sudoku4().rows("train"))[:3]
    lines = [{"input": row.row["metadata"]["problem"], "output": row.row["response"]} for row in rows]
    lines.append({"input": "12"})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(max_length=128, on_bad_row="skip", num_workers=0)
    task = TaskConfig(["sudoku4"], {"sudoku4": str(tmp_path / "test.jsonl")}, train_rows=20)
    noise = MaskedDiffusion(DiffusionConfig(), tokenizer.mask_token_id, 0).corrupt
    layout = BatchLayout(0, 1, 4, 1)
    _, _, prepared = build_batches(Config(data=data, task=task), tokenizer, layout, noise, noise)
    report = prepared["training"].report
    assert (report.read, report.kept) == (24, 20)
    assert {reason: noted.count for reason, noted in report.dropped.items()} == {
        "cannot be used": 0,
        "problems of task.name=sudoku4 that cannot be used": 1,
        "problems of task.name=sudoku4 that are test rows too": 3,
    }
    report = prepared["validation"].report
    assert (report.read, report.kept) == (4, 3)
    assert report.dropped["problems of task.name=sudoku4 that cannot be used"].count == 1
    data.on_bad_row = "error"
    with pytest.raises(ValueError, match=r"test\.jsonl:4"):
        build_batches(Config(data=data, task=task), tokenizer, layout, noise, noise)
