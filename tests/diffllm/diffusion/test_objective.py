"""A second objective: one file with settings and a class, and one choice, which no other line of the project knows."""

from dataclasses import dataclass

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from diffllm.attention import visibility_of
from diffllm.diffusion import OBJECTIVES, Objective, ObjectiveConfig
from launch import CONF
from launch.arguments import check_arguments
from launch.cli import register_defaults
from tests.trainer.runs import metrics, train
from trainer.config import to_dict
from trainer.nonfinite import FailedStep
from trainer.replay import replay
from trainer.schema import field_names, resolve


@dataclass
class ByPlaceConfig(ObjectiveConfig):
    objective: str = "by_place"
    every: int = 2  # one in so many response tokens is masked, each with a time of its own


class ByPlace(Objective):
    """Masks each n-th token of the response, and weighs it by its place."""

    settings = ByPlaceConfig

    def corrupt(self, batch, epoch):
        place = batch["maskable"].long().cumsum(-1)
        masked = batch["maskable"] & (place % self.config.every == 0)
        x_t = torch.where(masked, self.mask_token_id, batch["input_ids"])
        return {**batch, "x_t": x_t, "masked": masked, "weights": 1 / (1 + place) * masked}

    def denominator(self, batch):
        return batch["weights"].double().sum()

    def loss(self, model, batch):
        names = ("x_t", "input_ids", "masked", "weights")
        seen = visibility_of(batch)
        return model(*(batch[name] for name in names), position_ids=batch["position_ids"], visibility=seen)

    def measure(self, batch, output):
        return torch.stack([output.nll.double().sum(), batch["masked"].sum().double()])

    def metrics(self, sums):
        return {"nll": sums[0] / sums[1]}


del OBJECTIVES[ByPlaceConfig.objective]  # other tests see the project's own


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, ByPlaceConfig.objective, ByPlace)
    register_defaults()
    ConfigStore.instance().store("by_third", {"defaults": ["by_place"], "every": 3}, group="diffusion")


def test_it_is_trained_and_validated_in_any_layout(small_run, capsys):
    def run(name, **changes):
        config = small_run(name, **changes)
        config.diffusion = ByPlaceConfig()
        return metrics(train(config))

    one = run("one", trainer__logger=["console"])
    assert "step 12 of 12: loss " in (shown := capsys.readouterr().out)
    assert "val/nll" in shown
    assert run("split", data__micro_batch_size_per_gpu=2)[-1]["train/nll"] == pytest.approx(one[-1]["train/nll"])
    assert one[-1]["train/loss"] < one[0]["train/loss"]
    assert {"train/nll", "val/nll"} <= one[-1].keys()
    assert "train/elbo" not in one[-1]


def test_a_step_of_it_that_was_not_finite_is_replayed(small_run, tmp_path):
    config = small_run(trainer__max_steps=1)
    config.diffusion = ByPlaceConfig()
    checkpoint = train(config) / "checkpoints" / "step_00000001"
    ids = torch.tensor([[70, 71, 72, 73]])
    rows = {"input_ids": ids, "maskable": ids > 70, "position_ids": ids - 70, "attention_mask": torch.ones_like(ids)}
    batch = ByPlace(config.diffusion, 1, 0).corrupt(rows | {"sample_index": torch.tensor([5])}, 0)
    failed = FailedStep(2, 0, 1.0, torch.float32, [batch], to_dict(config), str(checkpoint))
    [row] = replay(failed.write(tmp_path))
    assert (row["sample_index"], row["masked"]) == (5, 1)
    assert row["loss"] > 0


def test_a_choice_of_the_command_line_brings_its_settings():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve(compose("config", ["diffusion=by_third", "trainer.experiment_name=x"]))
    assert config.diffusion == ByPlaceConfig(every=3)


def test_its_fields_are_known_and_those_of_others_refused():
    assert "diffusion.every" in field_names()
    with pytest.raises(ValueError, match=r"diffusion\.evry=3: .*diffusion\.every"):
        check_arguments(["diffusion.evry=3"])
    with (
        initialize_config_dir(str(CONF), version_base="1.3"),
        pytest.raises(ValueError, match=r"diffusion\.every: diffusion\.objective=masked .*diffusion=CHOICE"),
    ):
        resolve(compose("config", ["diffusion.every=3", "trainer.experiment_name=x"]))


def test_a_choice_with_the_name_of_an_objective_would_include_itself(monkeypatch, tmp_path):
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion" / "by_place.yaml").write_text("defaults: [by_place]\n")
    monkeypatch.setattr("launch.arguments.CONF", tmp_path)
    with pytest.raises(ValueError, match=r"conf/diffusion/by_place\.yaml: .*another name"):
        check_arguments([])


@pytest.mark.parametrize("name", ["unknown", None, ["masked"]])
def test_an_unknown_objective_is_named_with_those_that_exist(name):
    with pytest.raises(ValueError, match=r"diffusion\.objective=.*masked"):
        resolve(OmegaConf.create({"diffusion": {"objective": name}}))


def test_two_objectives_cannot_have_one_name():
    with pytest.raises(TypeError, match=r"objective=by_place is ByPlace"):
        type("Other", (ByPlace,), {"settings": ByPlaceConfig})
    with pytest.raises(TypeError, match="settings of its own"):
        type("Other", (ByPlace,), {})
