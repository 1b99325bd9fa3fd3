"""Settings as text: each value is read as it was written."""

import re

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
    ("name", "text"),
    [("steps", "many"), ("seed", ""), ("temperature", "warm"), ("stop_at_eos", "maybe"), ("stop", "\\ud800")],
)
def test_a_value_of_another_type(name, text):
    given = repr([text]) if name == "stop" else text
    with pytest.raises(ValueError, match=re.escape(f"sampling.{name}={given}: ")):
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
        ("stepps=2", "stepps: .* steps"),
        ("compile=true", "compile: "),
        ("steps=0", r"sampling\.steps=0: "),
        ("steps='2", "steps='2: "),
        ("seed=1 steps", "steps: "),
        ("steps=", "steps=: "),
        ("sampling=", "sampling=: "),
        ("=6", "=6: "),
    ],
)
def test_changes_that_are_refused(line, message):
    """The error names the setting and the value, or one that may be meant."""
    with pytest.raises(ValueError, match=f"^{message}"):
        changed(SamplingConfig(), line, None)
