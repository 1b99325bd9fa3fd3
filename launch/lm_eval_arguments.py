"""Arguments of the model `diffllm` of lm-eval: names of other harnesses, types, and settings of the run."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import nearest
from data.settings import check_fields, setting
from launch import CONF
from launch.recommended import resolve_recommended
from sampling import SamplingConfig
from trainer.config import Config
from trainer.distributed import Distributed
from trainer.schema import field_names

SAMPLING = [item.name for item in fields(SamplingConfig)]

# Arguments by the names that the harnesses of Dream, LLaDA and dLLM give them.
RENAMED = {
    "pretrained": "model.path",
    "model_path": "model.path",
    "diffusion_steps": "sampling.steps",
    "gen_length": "sampling.max_new_tokens",
    "block_size": "sampling.block_length",
    "remasking": "sampling.alg",
    "cfg": "sampling.cfg_scale",
    "classifier_free_guidance": "sampling.cfg_scale",  # see `_guidance`
}
SETTINGS = {
    **{name: f"sampling.{name}" for name in SAMPLING},
    **{name: name for name in field_names() if name.startswith("model.")},
    **RENAMED,
}


@dataclass
class HarnessConfig:
    """Arguments of the model `diffllm` that are no settings of sampling or model.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    add_bos_token: bool = False  # begin each prompt with the tokenizer's bos
    escape_until: bool = False  # ignore the stop strings of tasks
    mc_num: int = setting(128, at_least=2)  # masks drawn for a likelihood, an even number
    nll_type: str = setting("mc", choices=("mc",))  # the Monte Carlo bound of sampling.likelihood
    is_check_greedy: bool = True  # false: no continuation is reported as the greedy one, which saves its forwards
    max_length: int | None = setting(None, at_least=2)  # tokens of prompt and response; null is the model's context
    device: str | None = None  # null is the GPU, if there is one
    dtype: str = setting("auto", choices=("auto", "bfloat16", "float32"))  # must be that of the device
    trust_remote_code: bool = False  # lm-eval adds it for its data sets; code of a checkpoint never runs

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mc_num % 2:
            raise ValueError(f"mc_num={self.mc_num}: must be even")


OWN = [item.name for item in fields(HarnessConfig)]
T = TypeVar("T", HarnessConfig, SamplingConfig)


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `HarnessConfig` among the arguments, and settings of the run by their dotted names.

    Raises:
        ValueError: an unknown name, or two names of a setting.
    """
    for name, value in arguments.items():
        if name not in OWN and name not in SETTINGS:
            hint = nearest(name, [*OWN, *SETTINGS])
            raise ValueError(f"{name}={value}: no such argument of the model diffllm; {hint}")
    own = {name: value for name, value in arguments.items() if name in OWN}
    others = {name: value for name, value in arguments.items() if name in SETTINGS}
    targets = [SETTINGS[name] for name in others]
    if synonyms := [name for name in others if targets.count(SETTINGS[name]) > 1]:
        raise ValueError(f"{', '.join(synonyms)}: name the same setting; give one of them")
    if (name := "classifier_free_guidance") in others:
        others[name] = _guidance(others[name])
    return own, dict(zip(targets, others.values(), strict=True))


def _guidance(value: Any) -> float:
    """`sampling.cfg_scale` for Dream's factor on l - l_u, which is 1 + cfg_scale; up to 1 there is no guidance."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"classifier_free_guidance={value}: must be a number; 1 is no guidance")
    return max(value - 1.0, 0.0)


def typed(config: T, values: Mapping[str, Any]) -> T:
    """A dataclass with some values, as the types of its fields.

    Raises:
        ValueError: a value of the wrong type or outside its range.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), dict(values)))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {error.msg.splitlines()[0]}") from error


def compose_settings(settings: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The run with some settings, and with those that its checkpoint recommends where the settings have none.

    Returns:
        The resolved tree, and the lines of `resolve_recommended`.

    Raises:
        ValueError: no checkpoint is given, or see `resolve_recommended`.
    """
    if settings.get("model.path") is None:
        raise ValueError("pretrained is missing: name a checkpoint, such as pretrained=outputs/quickstart/hf")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = compose("config", ["trainer.experiment_name=lm_eval"])
        for name, value in settings.items():
            OmegaConf.update(tree, name, value)
        lines: list[str] = []
        config = resolve_recommended(tree, [f"{name}={value}" for name, value in settings.items()], lines.append)
    return config, lines


def device_of(config: HarnessConfig, distributed: Distributed) -> torch.device | None:
    """The device of the model, None for the default one.

    Raises:
        ValueError: no such device, one for several ranks, or another dtype than the device's.
    """
    if config.device is not None and distributed.size > 1:
        raise ValueError(f"device={config.device}: each of several ranks has its own; leave it out")
    try:
        device = None if config.device is None else torch.device(config.device)
    except RuntimeError as error:
        raise ValueError(f"device={config.device}: must be one such as cpu, cuda or cuda:1") from error
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    if config.dtype not in ("auto", its := "bfloat16" if on_gpu else "float32"):
        raise ValueError(f"dtype={config.dtype}: models are sampled in {its} on this device; leave it out")
    return device
