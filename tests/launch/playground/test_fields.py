"""Settings as text: each value is read as it was written."""

import pytest

from launch.playground.fields import changed, from_text, to_text
from sampling import SamplingConfig

FAST = SamplingConfig(transfer="threshold", cache="dual", seed=9)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("steps", 7, "7"),
        ("steps", None, "null"),
        ("top_p", 0.5, "0.5"),
        ("stop_at_eos", False, "false"),
        ("alg", "entropy", "entropy"),
        ("stop", [], ""),
        ("stop", ["\n\n", "a\\n", "\té"], "\\n\\n\na\\\\n\n\\té"),
    ],
)
def test_a_value_is_read_as_written(name, value, text):
    assert to_text(name, value) == text
    assert from_text(name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", "many", "sampling.steps=many: must be a whole number"),
        ("seed", "", "sampling.seed=: must be a whole number"),
        ("temperature", "warm", "sampling.temperature=warm: must be a number"),
        ("stop_at_eos", "maybe", "must be true or false"),
        ("stop", "\\ud800", "half of a surrogate pair"),
    ],
)
def test_a_value_of_another_type(name, text, message):
    with pytest.raises(ValueError, match=message):
        from_text(name, text)


def test_changes_apply_to_settings():
    config = SamplingConfig(steps=4, seed=3)
    assert changed(config, "steps=6 sampling.alg=origin", None) == SamplingConfig(steps=6, alg="origin", seed=3)
    assert changed(config, "stop='a b' steps=null", None) == SamplingConfig(stop=["a b"], seed=3)
    presets = {"fast": FAST}
    assert changed(config, "sampling=fast steps=2", presets.get) == SamplingConfig(
        transfer="threshold", cache="dual", steps=2, seed=3
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stepps=2", "stepps: no such setting of the page; did you mean steps"),
        ("compile=true", "compile: no such setting of the page"),
        ("steps=0", "sampling.steps=0: must be at least 1"),
        ("steps='2", "No closing quotation"),
        ("steps", "must be a whole number|at least 1"),
    ],
)
def test_changes_that_are_refused(line, message):
    if line == "steps":  # without a value it is null
        assert changed(SamplingConfig(steps=3), line, None) == SamplingConfig()
        return
    with pytest.raises(ValueError, match=message):
        changed(SamplingConfig(), line, None)
