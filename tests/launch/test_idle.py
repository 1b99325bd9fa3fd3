"""Settings of a command line that do nothing are named."""

import pytest
from omegaconf import OmegaConf

from diffllm.diffusion import OBJECTIVES
from launch.idle import idle_settings
from trainer.schema import resolve, tree


def lines(*overrides):
    return list(idle_settings(resolve(OmegaConf.from_dotlist(list(overrides))), overrides))


@pytest.mark.parametrize(
    ("setting", "needed", "wrong"),
    [
        ("sampling.threshold=0.8", "sampling.transfer=threshold", "sampling.transfer=factor"),
        ("sampling.steps=4", "sampling.transfer=cosine", "sampling.transfer=threshold"),
        ("data.decontaminate_words=5", "data.decontaminate_files=[test.jsonl]", "data.filter=null"),
        ("diffusion.cart_p=0.5", "diffusion.time_reweighting=cart", "diffusion.time_reweighting=none"),
        ("model.lora_alpha=8", "model.lora_rank=2", "model.lora_rank=0"),
    ],
)
def test_a_setting_that_does_nothing_is_named_with_what_lets_it(setting, needed, wrong):
    assert lines(setting, needed) == []
    (line,) = lines(setting, wrong)
    assert line.startswith(f"warning: {setting} does nothing without {needed.partition('=')[0]}")


def test_the_shape_of_a_checkpoint_is_its_own():
    assert lines("model.hidden_size=64") == []
    (line,) = lines("model.hidden_size=64", "model.path=mine")
    assert line == "warning: model.hidden_size=64 does nothing: config.json of model.path=mine decides"


def test_a_default_undoes_a_choice_without_a_word():
    assert lines("sampling.steps=null", "sampling.transfer=threshold") == []


def test_the_settings_that_others_need_exist():
    known = dict(tree(*(objective.settings for objective in OBJECTIVES.values())))
    for name, item in known.items():
        for other, values in (item.metadata.get("used_with") or {}).items():
            needed = f"{name.partition('.')[0]}.{other}"
            assert needed in known
            for value in values:
                resolve(OmegaConf.from_dotlist([f"{needed}={value}"]))
