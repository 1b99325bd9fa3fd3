"""Visibility as a decoder's attention takes it."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from diffllm import load_model
from diffllm.attention import attend_in_groups, attention_for, varlen_attention, visibility_of
from diffllm.diffusion.loss import Focal
from sampling import SamplingConfig, Visibility
from sampling.canvas import count_positions
from tests.conftest import GOLDEN


@pytest.fixture(params=["dream", "llada"])
def model(request):
    return request.getfixturevalue(request.param)


def states(model, x, positions, visibility):
    every = torch.ones_like(x, dtype=torch.bool).nonzero(as_tuple=True)
    return model.hidden(x, positions, visibility, *every).unflatten(0, x.shape)


@pytest.mark.parametrize("unpad", [False, True])
@torch.no_grad()
def test_packed_rows_are_those_that_stand_alone(model, unpad, monkeypatch):
    """Two documents in a row, behind padding; shifted models predict each first token from itself."""
    if unpad:
        monkeypatch.setattr(model, "unpad", True)
        monkeypatch.setattr(model.lm.config, "_attn_implementation", "varlen")
    first, second = torch.arange(5)[None] + 10, torch.arange(7)[None] + 40
    x = torch.cat([torch.zeros(1, 2, dtype=torch.long), first, second], dim=1)
    positions = torch.cat([torch.ones(2).long(), torch.arange(5), torch.arange(7)])[None]
    attended, document = torch.arange(14)[None] >= 2, (torch.arange(14)[None] >= 7).long()
    packed = states(model, x, positions, Visibility(attended=attended, document=document))[0]
    for alone, part in ((first, packed[2:7]), (second, packed[7:])):
        expected = states(model, alone, torch.arange(alone.shape[1])[None], Visibility())[0]
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_blocks_do_not_see_later_ones(model):
    x, block = torch.arange(8)[None] + 20, torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    positions = torch.arange(8)[None]
    before = states(model, x, positions, Visibility(block=block))
    changed = torch.where(block == 2, 99, x)
    after = states(model, changed, positions, Visibility(block=block))
    torch.testing.assert_close(before[0, :5], after[0, :5])
    assert not torch.equal(before[0, 6:], after[0, 6:])
    assert not torch.equal(before[0, :5], states(model, x, positions, Visibility())[0, :5])


def test_a_batch_without_padding_hides_nothing():
    batch = {"attention_mask": torch.ones(2, 3).long(), "position_ids": torch.arange(3).expand(2, 3)}
    assert visibility_of(batch) == Visibility()
    batch["attention_mask"][0, 0] = 0
    assert visibility_of(batch).attended.tolist() == [[False, True, True], [True] * 3]


def test_nothing_is_given_twice(small_model):
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="leave out attention_mask"):
        small_model(ids, ids, ids > 0, ids.float(), ids, visibility=Visibility())
    with pytest.raises(ValueError, match="leave out focal"):
        small_model(ids, ids, ids > 0, ids.float(), focal=Focal(1.0, 2.0), token_loss=Focal(1.0, 1.0))


@pytest.fixture(scope="module", params=["dream_tiny", "llada_tiny"])
def varlen(request):
    return load_model(GOLDEN / request.param, attn_implementation="varlen").eval()


@torch.no_grad()
def test_rows_without_their_padding(varlen, monkeypatch):
    """The bounds of segments reach the attention, and every row is as with its padding behind a mask."""
    x, attended = torch.randint(200, (3, 9)), torch.arange(9) >= torch.tensor([0, 4, 7])[:, None]
    positions = count_positions(attended)
    unpadded = states(varlen, x, positions, Visibility(attended=attended))
    monkeypatch.setattr(varlen, "unpad", False)
    padded = states(varlen, x, positions, Visibility(attended=attended))
    torch.testing.assert_close(unpadded[attended], padded[attended], rtol=1e-5, atol=1e-5)
    assert not torch.equal(unpadded[attended], padded[attended])  # another sum, so another attention


@pytest.mark.parametrize("padded", [False, True])
def test_heads_that_share_keys_lie_side_by_side(padded):
    """As Transformers attends, whose copies of the keys they save."""
    query, key, value = torch.randn(2, 6, 3, 8), *torch.randn(2, 2, 2, 20, 8)
    visible = torch.rand(2, 1, 1 if padded else 3, 20) < 0.5
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    layer = SimpleNamespace(num_key_value_groups=3, is_causal=False)
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask)
    torch.testing.assert_close(attend_in_groups(query, key, value, mask, None), expected)
    with torch.no_grad():
        torch.testing.assert_close(varlen_attention(layer, query, key, value, mask)[0], expected)


def test_what_has_no_segments_is_padded(varlen):
    """Pairs and caches need a mask, which FlashAttention would refuse."""
    x = torch.randint(200, (2, 6))
    attended = torch.arange(6) >= torch.tensor([0, 2])[:, None]
    pairs = torch.ones(2, 6, 6, dtype=torch.bool).tril()
    seen = states(varlen, x, count_positions(attended), Visibility(attended=attended, pairs=pairs))
    assert seen.isfinite().all()
    varlen.check_sampling(SamplingConfig(cache="dual"))


@pytest.mark.parametrize(
    ("setting", "dtype", "capability", "chosen"),
    [
        ("auto", torch.bfloat16, (9, 0), "varlen"),
        ("auto", torch.float32, (9, 0), "sdpa"),
        ("auto", torch.bfloat16, (7, 5), "sdpa"),
        ("varlen", torch.bfloat16, (8, 0), "varlen"),
        ("varlen", torch.float32, (9, 0), None),
        ("varlen", torch.bfloat16, (7, 5), None),
        ("sdpa", torch.bfloat16, (9, 0), "sdpa"),
    ],
)
def test_the_attention_of_a_gpu(setting, dtype, capability, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    gpu = torch.device("cuda")
    if chosen is None:
        with pytest.raises(
            ValueError, match=r"attn_implementation=varlen needs bf16 and .* 8\.0 .* on a GPU; use sdpa"
        ):
            attention_for(setting, gpu, dtype)
    else:
        assert attention_for(setting, gpu, dtype) == chosen


def test_the_attention_of_a_cpu():
    cpu = torch.device("cpu")
    assert [attention_for(name, cpu) for name in ("auto", "sdpa", "varlen")] == ["sdpa", "sdpa", "varlen"]
    with pytest.raises(ValueError, match="flash_attention_2 needs a GPU, and none is here; use sdpa or varlen"):
        attention_for("flash_attention_2", cpu)


def test_documents_would_replace_a_window(small_model):
    small_model.windowed = True
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="layers without a window"):
        small_model(ids, ids, ids > 0, ids.float(), visibility=Visibility(document=ids))
