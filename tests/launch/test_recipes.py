"""Experiments that are named after a card fit on it, and the README has their figures."""

import math
import re
from collections import Counter
from statistics import NormalDist

import pytest

from data import Report
from data.quantities import duration_text, size_text
from launch import CONF
from launch.budget import count_steps, step_time
from launch.machine import Machine, complete
from launch.plan import make_plan
from tests.conftest import ROOT
from trainer.speed import GPUS

# Cards by their size in GB. The names of experiments promise sizes.
CARDS = {24: ("3090", "4090", "l4"), 48: ("a6000", "6000-ada", "l40s"), 80: ("a100-80", "h100-pcie", "h100")}
SIZE = re.compile(r"(\d+)gb")
RECIPES = {path.stem: (1, int(SIZE.search(path.stem)[1])) for path in CONF.glob("experiment/*gb*.yaml")}
RECIPES["dream_s1k"] = (8, 80)


@pytest.fixture(scope="module")
def plans():
    """Each recipe, planned for the card of its size with the least memory."""
    cards = {size: min(names, key=lambda name: GPUS[name].memory) for size, names in CARDS.items()}
    return {
        name: make_plan([f"experiment={name}", f"gpu={cards[size]}", f"gpus={gpus}"])
        for name, (gpus, size) in RECIPES.items()
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_card(plans, name):
    plan = plans[name]
    assert plan.fits, f"{plan.needed:,} of {plan.usable:,.0f} bytes"
    assert plan.layout.global_batch_size == 32


@pytest.mark.parametrize("name", RECIPES)
def test_adapters_have_a_learning_rate_of_their_own(plans, name):
    config = plans[name].config
    assert bool(config.model.lora_rank) == ("lora" in name)
    assert config.optim.lr == (1e-4 if "lora" in name else 2e-6)
    assert config.model.lora_alpha == max(16, config.model.lora_rank)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("experiment/*.yaml")))
def test_an_experiment_names_its_run(name):
    assert f"experiment_name: {name}\n" in (CONF / "experiment" / f"{name}.yaml").read_text()


# Cells of a row: experiment, arguments of launch.plan, memory, time.
TABLE = re.findall(r"^\| `(\w+)` \|.*\| `(.*?)` \| (.*) \| (.*) \|$", (ROOT / "launch" / "README.md").read_text(), re.M)


def test_the_readme_names_every_recipe():
    assert {name for name, *_ in TABLE} == {*RECIPES}


@pytest.mark.parametrize(("name", "arguments", "memory", "time"), TABLE, ids=[name for name, *_ in TABLE])
def test_the_readme_has_the_figures_of_launch_plan(plans, name, arguments, memory, time):
    plan, machine = plans[name], dict(argument.split("=") for argument in arguments.split())
    gpus = complete(Machine(gpu=machine["gpu"], gpus=int(machine.get("gpus", 1))))
    steps = count_steps(plan.config, plan.layout, rows=1000)
    assert (gpus.count, plan.config.trainer.total_epochs) == (plan.gpus.count, 3)
    assert memory == size_text(plan.needed)
    assert time == duration_text(steps * step_time(plan.model, plan.config, plan.layout, gpus).total)


@pytest.mark.parametrize("model", ["dream_7b_instruct", pytest.param("llada_8b_instruct", marks=pytest.mark.slow)])
def test_adapters_beside_a_large_model_fit_a_card_of_24_gb(model):
    plan = make_plan(["experiment=lora", f"model={model}", "gpu=4090"])
    assert plan.fits, f"{plan.needed:,} of {plan.usable:,.0f} bytes"
    assert plan.config.optim.lr == 1e-4


SECTION = (ROOT / "launch" / "experiments" / "README.md").read_text().partition("\n## full")[2].partition("\n## ")[0]
# Cells of a row: cards; memory and time with the weights in the host, then on the cards.
FULL = re.findall(r"^\| (\d) \| (.+) \| (.+) \| (.+) \| (.*?) ?\|$", SECTION, re.M)


@pytest.mark.parametrize(("gpus", "memory", "time", "without", "faster"), FULL, ids=[gpus for gpus, *_ in FULL])
def test_the_full_recipe_is_planned_for_one_four_and_eight_cards(gpus, memory, time, without, faster):
    def figures(offload: str) -> tuple[str, str]:
        plan = make_plan(["experiment=full", "gpu=h100", f"gpus={gpus}", f"trainer.cpu_offload={offload}"])
        assert plan.layout.global_batch_size == 32
        steps = count_steps(plan.config, plan.layout, rows=1000)
        seconds = steps * step_time(plan.model, plan.config, plan.layout, plan.gpus).total
        return (size_text(plan.needed), duration_text(seconds)) if plan.fits else ("does not fit", "")

    assert [gpus for gpus, *_ in FULL] == ["1", "4", "8"]
    assert figures("true") == (memory, time)
    assert figures("false") == (without, faster)


def s1k_lengths() -> Counter[int]:
    """Rows by tokens of a log-normal set like S1K: on average 4,700 tokens, 74 % above 4,096 (arXiv 2501.19393)."""
    z = NormalDist().inv_cdf(1 - 0.74)
    sigma = z + math.sqrt(z**2 + 2 * math.log(4700 / 4096))
    lengths = NormalDist(math.log(4096) - z * sigma, sigma)
    return Counter(round(math.exp(lengths.inv_cdf((row + 0.5) / 1000))) for row in range(1000))


def test_the_share_of_s1k_that_a_length_keeps():
    """As conf/data/s1k.yaml says."""
    lengths = s1k_lengths()
    assert sum(length * rows for length, rows in lengths.items()) / 1000 == pytest.approx(4700, rel=1e-3)
    kept = [sum(rows for length, rows in lengths.items() if length <= limit) for limit in (2048, 4096, 8192)]
    assert kept == [0, 260, 999]
    said = re.search(
        r"(\S+) % within 2,048, (\S+) % within 4,096 and (\S+) %", (CONF / "data" / "s1k.yaml").read_text()
    )
    assert [float(share) * 10 for share in said.groups()] == pytest.approx(kept)
    for limit, warns in ((2048, True), (4096, True), (8192, False)):
        assert bool(Report("training", max_length=limit, whole=lengths).warning()) == warns


@pytest.mark.parametrize("name", [name for name in RECIPES if "s1k" in name])
def test_a_recipe_keeps_most_of_s1k(plans, name):
    longest = plans[name].config.data.max_length
    assert sum(rows for length, rows in s1k_lengths().items() if length <= longest) > 990
