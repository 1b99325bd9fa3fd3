"""Strictness, batch arithmetic, and what makes a run another one."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import launch.cli  # noqa: F401 - registers the defaults
from launch import CONF
from launch.arguments import group_choices
from trainer.config import Config, batch_layout, to_dict
from trainer.config import DataConfig as DataSettings
from trainer.schema import differences, resolve, tree


def resolved(*overrides, **extra):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=["trainer.experiment_name=test", *overrides])
    OmegaConf.set_struct(composed, False)  # as a YAML file, which may hold any key
    return resolve(OmegaConf.merge(composed, extra))


CHOICES = [(path.parent.name, path.stem) for path in sorted(CONF.glob("*/*.yaml"))]
PRESETS = [choice for choice in group_choices()["sampling"] if "/" in choice]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group, choice):
    assert isinstance(resolved(f"{group}={choice}"), Config)


@pytest.mark.parametrize(
    ("overrides", "transfer", "temperature"),
    [
        (["model=llada_8b_instruct"], "even", 0.0),
        (["model=dream_coder_7b_instruct"], "linear", 0.1),
        (["model=diffucoder_7b"], "linear", 0.2),
        (["experiment=dream_s1k"], "linear", 0.2),
        (["experiment=dream_s1k", "model=llada_1_5"], "even", 0.0),
        (["sampling=fast", "model=llada_8b"], "threshold", 0.0),
        (["model=dream_7b", "sampling=default"], "linear", 0.0),
        (["model=sdar_8b_chat"], "threshold", 1.0),
        (["model=fast_dllm_v2_7b"], "threshold", 0.0),
        (["model=qwen2_5_7b"], "linear", 0.0),
    ],
    ids=str,
)
def test_a_model_chooses_its_sampling_unless_the_command_line_does(overrides, transfer, temperature):
    config = resolved(*overrides)
    assert (config.sampling.transfer, config.sampling.temperature) == (transfer, temperature)


def test_the_base_model_of_llada_fills_one_block_and_the_others_several():
    models = ("llada_8b", "llada_8b_instruct", "llada_1_5")
    assert [resolved(f"model={name}").sampling.block_length for name in models] == [None, 32, 32]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_takes_a_step_for_each_token_and_names_its_source(preset):
    sampling = resolved(f"sampling={preset}", "model=llada_8b_instruct").sampling
    assert (sampling.steps, sampling.seed, sampling.stop_at_eos) == (None, 0, True)
    assert sampling.transfer == ("even" if preset.startswith("llada") else "linear")
    assert sampling.temperature == 0 or (sampling.confidence, sampling.alg) == ("scaled", "entropy")
    assert "\n# https://github.com/" in (CONF / "sampling" / f"{preset}.yaml").read_text()
    page = (CONF.parent / "sampling" / "README.md").read_text()
    model, _, task = preset.partition("/")
    lines = [line for line in page.splitlines() if line.startswith(f"| `{model}/` ")]
    assert any(f"`{task}` {sampling.max_new_tokens:,} " in line for line in lines)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("dream_instruct/math", {"max_new_tokens": 512, "temperature": 0.1, "top_p": 0.9}),
        ("dream_base/gsm8k", {"max_new_tokens": 256, "temperature": 0.0, "top_p": 0.95}),
        ("dream_base/humaneval", {"max_new_tokens": 512, "temperature": 0.2, "top_p": 0.95}),
        ("dream_coder_base/mbpp", {"max_new_tokens": 512, "temperature": 0.1, "top_p": 0.9}),
        ("llada_base/gsm8k", {"max_new_tokens": 1024, "block_length": None, "eos_confidence": "keep"}),
        ("llada_instruct/gsm8k", {"max_new_tokens": 512, "block_length": None, "eos_confidence": "suppress"}),
        ("llada_instruct/gsm8k_blocks", {"max_new_tokens": 256, "block_length": 8, "eos_confidence": "keep"}),
        ("llada_instruct/humaneval", {"max_new_tokens": 512, "forbidden": ["<|endoftext|>"]}),
        ("llada_1_5/math", {"max_new_tokens": 1024, "block_length": 128, "eos_confidence": "suppress"}),
    ],
)
def test_published_settings(preset, expected):
    sampling = resolved(f"sampling={preset}").sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


@pytest.mark.parametrize("name", [name for name, item in tree() if item.metadata.get("path")])
def test_paths_begin_at_the_home_of_the_user(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    found = config = resolved(f"{name}='~/x'")
    for part in name.split("."):
        found = getattr(found, part)
    assert found == (["/home/user/x"] if name.endswith("files") else "/home/user/x")
    assert config.trainer.project_name == "diffllm"
    assert resolved("model.path='a/~b'").model.path == "a/~b"


def test_yaml_sets_what_it_says():
    config = resolved("experiment=dream_s1k")
    assert config.model.path == "Dream-org/Dream-v0-Base-7B"
    assert config.diffusion.time_reweighting == "cart"
    assert config.optim.lr == 2e-6
    assert config.trainer.output_dir == "outputs/test"


def test_a_list_of_one_needs_no_brackets():
    config = resolved("data.train_files=a.jsonl", "trainer.logger=wandb")
    assert config.data.train_files == ["a.jsonl"]
    assert config.trainer.logger == ["wandb"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r'["\n\n"]', ["\n\n"]),
        ('["\n\n"]', ["\n\n"]),
        (r"\n\n", ["\n\n"]),
        (r"[a\tb,'\r']", ["a\tb", "\r"]),
        (r"['\\n','a\\\\b']", [r"\n", r"a\\b"]),
        (r"['\begin','a\ b']", [r"\begin", r"a\ b"]),
        (r'["\u00e9\u4F60","\ud83d\ude00"]', ["é你", "😀"]),
        (r'["\u12","\U0001F600"]', [r"\u12", r"\U0001F600"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("field", ["stop", "forbidden"])
def test_characters_that_a_shell_cannot_type(field, typed, meant):
    assert getattr(resolved(f"sampling.{field}={typed}").sampling, field) == meant
    texts = OverridesParser.create().parse_override(f"x={typed}").value()  # as they stand in a YAML file
    assert getattr(resolved(sampling={field: texts}).sampling, field) == meant


def test_half_a_character():
    with pytest.raises(ValueError, match=r"sampling\.stop=\['\\\\ud83d'\]: half of a surrogate pair"):
        resolved(r"sampling.stop=['\ud83d']")


def test_the_published_command_line_is_understood():
    config = resolved(
        "data.micro_batch_size_per_gpu=4",
        "data.max_length=2048",
        "trainer.total_epochs=3",
        "data.gradient_accumulation_steps=2",
        "model.enable_gradient_checkpointing=True",
        "data.enable_perbatch_cutoff=True",
        "data.perbatch_cutoff_type=random_with_input_pad",
        "trainer.val_check_interval=500",
    )
    assert batch_layout(config.data, 0, 2).global_batch_size == 16


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"optim": {"lrr": 1}}, r"optim\.lrr: no such setting; did you mean optim\.lr"),
        ({"optmi": {"lr": 1}}, r"optmi: no such setting; did you mean optim"),
        ({"optim": {"lr": "fast"}}, r"optim\.lr: Value 'fast'"),
        ({"data": {"train_files": 5}}, r"data\.train_files"),
        ({"seed": -1}, r"seed=-1: must be in \[0, "),
        ({"sampling": {"seed": -1}}, r"sampling\.seed=-1: must be at least 0"),
        ({"trainer": {"logger": ["wand"]}}, r"trainer\.logger=\['wand'\]: choose from console, wandb"),
        ({"optim": {"lr": 0}}, r"optim\.lr=0\.0: must be positive"),
        ({"optim": {"betas": [0.9]}}, r"optim\.betas=\[0\.9\]: must be two numbers"),
        ({"optim": {"lr_schedule": "step"}}, r"optim\.lr_schedule=step: choose one of cosine"),
        ({"trainer": {"precision": "fp8"}}, r"trainer\.precision=fp8"),
        ({"trainer": {"keep_checkpoints": 0}}, r"trainer\.keep_checkpoints=0: must be at least 1"),
        ({"trainer": {"val_samples": -1}}, r"trainer\.val_samples=-1: must be at least 0"),
        ({"data": {"max_length": 0}}, r"data\.max_length=0: must be at least 1"),
        ({"data": {"truncation": "left"}}, r"data\.truncation=left: choose one of error"),
        ({"data": {"num_workers": -1}}, r"data\.num_workers=-1"),
        ({"data": {"resp_cutoff_ratio": 2.0}}, r"data\.resp_cutoff_ratio=2\.0: must be in \[0, 1\]"),
        ({"model": {"num_attention_heads": 3}}, r"model\.num_attention_heads=3: must divide"),
        ({"model": {"family": "gpt"}}, r"model\.family=gpt: choose one of dream, llada"),
    ],
    ids=str,
)
def test_mistakes_are_named_with_the_rule(extra, message):
    with pytest.raises(ValueError, match=message):
        resolved(**extra)


@pytest.mark.parametrize(
    ("total", "micro", "accumulation", "ranks", "expected"),
    [
        (None, None, None, 2, (8, 1)),
        (64, None, None, 2, (32, 1)),
        (64, 8, None, 2, (8, 4)),
        (64, None, 4, 2, (8, 4)),
        (None, 4, 2, 2, (4, 2)),
        (64, 8, 4, 2, (8, 4)),
    ],
)
def test_batch_settings_are_derived(total, micro, accumulation, ranks, expected):
    data = DataSettings(
        train_batch_size=total, micro_batch_size_per_gpu=micro, gradient_accumulation_steps=accumulation
    )
    layout = batch_layout(data, 0, ranks)
    assert (layout.micro_batch_size, layout.micro_batches) == expected
    assert layout.global_batch_size == (total or expected[0] * expected[1] * ranks)


@pytest.mark.parametrize(
    ("total", "micro", "accumulation", "ranks"),
    [(64, 8, 2, 2), (63, None, None, 2), (10, 4, None, 1), (2, None, None, 4), (8, 16, None, 1)],
)
def test_contradictions_name_all_the_numbers(total, micro, accumulation, ranks):
    data = DataSettings(
        train_batch_size=total, micro_batch_size_per_gpu=micro, gradient_accumulation_steps=accumulation
    )
    numbers = rf"size={total}, .*gpu={micro}, .*steps={accumulation}, ranks={ranks}"
    with pytest.raises(ValueError, match=numbers):
        batch_layout(data, 0, ranks)


def test_what_makes_a_run_another_one():
    config = resolved("optim.lr=1e-3")
    saved = to_dict(config)
    config.trainer.max_steps = 5
    config.data.num_workers = 0
    assert differences(saved, config) == []
    config.optim.lr = 2e-3
    config.seed = 1
    assert differences(saved, config) == ["optim.lr was 0.001 and is 0.002", "seed was 0 and is 1"]


@pytest.mark.parametrize(
    ("there", "here"), [({}, {"a": False}), ({}, {"a": None}), ({"a": 1}, {"b": 1}), ({"a": {"b": 1}}, {"a": {"b": 2}})]
)
def test_a_chat_template_with_other_variables_is_another_run(there, here):
    config, other = resolved(model={"chat_template_kwargs": there}), resolved(model={"chat_template_kwargs": here})
    assert differences(to_dict(config), config) == []
    assert differences(to_dict(config), other) == [f"model.chat_template_kwargs was {there} and is {here}"]
    saved = to_dict(config)
    del saved["model"]["chat_template_kwargs"]  # by an older version
    assert bool(differences(saved, config)) is bool(there)


def test_variables_of_a_chat_template_on_the_command_line():
    config = resolved('model.chat_template_kwargs={enable_thinking: false, date: "a, b", tools: [x, {y: null}]}')
    assert config.model.chat_template_kwargs == {"enable_thinking": False, "date": "a, b", "tools": ["x", {"y": None}]}


def test_shape_settings_do_not_matter_where_a_checkpoint_has_its_own():
    config = Config()
    saved = to_dict(config)
    config.model.hidden_size = 256
    assert differences(saved, config) == ["model.hidden_size was 128 and is 256"]
    config.model.path = saved["model"]["path"] = "somewhere"
    assert differences(saved, config) == []


def test_columns_are_named_on_the_command_line():
    config = resolved("data.columns={prompt: query, response: output}")
    assert config.data.columns == {"prompt": "query", "response": "output"}
    assert resolved().data.columns is None
    with pytest.raises(ValueError, match=r"data\.columns={promt: query}: .*did you mean prompt"):
        resolved("data.columns={promt: query}")
    changed = differences(to_dict(resolved()), config)
    assert changed == ["data.columns was None and is {'prompt': 'query', 'response': 'output'}"]
