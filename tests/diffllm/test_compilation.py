"""What is compiled, and what happens where that fails."""

import pytest
import torch
from torch import nn
from torch._inductor import compile_fx
from torch.nn.attention.flex_attention import flex_attention

from diffllm import ModelConfig
from diffllm.block_attention import compiled_flex
from diffllm.compilation import WORTH_PASSES, backend_of, is_compiled, refusing_failures

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("setting", "device", "passes", "compiled"),
    [
        ("auto", GPU, WORTH_PASSES, True),
        ("auto", GPU, WORTH_PASSES - 1, False),
        ("auto", CPU, 10**6, False),
        ("true", CPU, 1, True),
        ("false", GPU, 10**6, False),
    ],
)
def test_what_is_compiled(setting, device, passes, compiled):
    assert is_compiled(setting, device, passes) is compiled


@pytest.mark.parametrize("value", [True, "true", "True"])
def test_a_bool_is_a_choice(value):
    assert ModelConfig(compile=value).compile == "true"
    with pytest.raises(ValueError, match=r"model\.compile=yes: choose one of auto, true, false"):
        ModelConfig(compile="yes")


@pytest.fixture
def no_compiler(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no compiler\nand where it was looked for")

    torch._dynamo.reset()
    monkeypatch.setattr(compile_fx, "compile_fx", fail)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x).relu()


def layers(setting: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer())
    for layer in model:
        layer.compile(backend=backend_of(setting))
    return model


@pytest.mark.usefixtures("no_compiler")
def test_what_cannot_be_compiled_runs_as_it_is(recwarn):
    model, plain, x = layers("auto"), nn.Sequential(Layer(), Layer()), torch.ones(2, 4)
    plain.load_state_dict(model.state_dict())
    for _ in range(3):
        model(x).sum().backward()
        plain(x).sum().backward()
    # Python prints equal warnings once.
    assert {text for warning in recwarn if "not compiled" in (text := str(warning.message))} == {
        "not compiled, which is slower: no compiler"
    }
    ours, expected = ([parameter.grad for parameter in each.parameters()] for each in (model, plain))
    torch.testing.assert_close(ours, expected)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("inside", [False, True])
def test_flex_attention_that_cannot_be_compiled_says_what_to_set(inside):
    """Alone, or in a layer that would run as it is without it."""
    attend = compiled_flex
    if inside:
        attend = torch.compile(lambda q: flex_attention(q, q, q) + 1, backend=backend_of("auto"))
    arguments = [torch.randn(1, 1, 128, 16)] * (1 if inside else 3)
    line = r"^FlexAttention cannot be compiled here \(no compiler\): set model\.attn_implementation=sdpa$"
    with torch.no_grad(), pytest.raises(ValueError, match=line), refusing_failures("model.compile", "auto"):
        attend(*arguments)


@pytest.mark.usefixtures("no_compiler")
def test_what_must_be_compiled_ends_in_one_line():
    line = r"^model\.compile=true: compilation failed \(no compiler\); set model\.compile=auto or false$"
    with pytest.raises(ValueError, match=line), refusing_failures("model.compile", "true"):
        layers("true")(torch.ones(2, 4))
