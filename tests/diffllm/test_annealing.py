"""Attention from causal to bidirectional."""

import pytest
import torch
from transformers import Qwen2ForCausalLM

from diffllm import new_model
from diffllm.annealing import AttentionAnnealing
from sampling import Visibility
from tests.conftest import small_shape
from tests.diffllm.decoders import write_decoder
from tests.trainer.runs import losses, train


def pairs_only(ids, pairs):
    return torch.arange(ids.shape[1]).expand_as(ids), Visibility(pairs=pairs)


def batch_of(rows: list[int], left_padding: int = 0) -> dict[str, torch.Tensor]:
    L = max(rows) + left_padding
    attended = torch.arange(L) >= L - torch.tensor(rows)[:, None]
    positions = attended.long().cumsum(-1) - 1
    return {"attention_mask": attended.long(), "position_ids": torch.where(attended, positions, 1)}


def test_a_position_sees_more_of_what_follows_with_every_step():
    annealing = AttentionAnnealing(steps=4, size=200, seed=0)
    after = torch.ones(200, 200).triu(1).bool()
    shares = []
    for step in range(1, 4):
        visible = annealing([batch_of([200])], step)[0]["pairs"][0]
        assert visible[~after].all()
        shares.append(float(visible[after].float().mean()))
    # 19,900 draws: four standard deviations are 0.014; a false alarm in 16,000
    assert shares == pytest.approx([0.25, 0.5, 0.75], abs=0.014)
    assert "pairs" not in annealing([batch_of([200])], 4)[0]
    assert "pairs" not in AttentionAnnealing(steps=0, size=9, seed=0)([batch_of([9])], 1)[0]


def test_what_is_visible_does_not_depend_on_the_layout():
    annealing = AttentionAnnealing(steps=9, size=30, seed=5)
    [alone] = annealing([batch_of([7])], 3)
    visible = alone["pairs"][0]
    short, padded = annealing([batch_of([7]), batch_of([7, 12], left_padding=3)], 3)
    assert torch.equal(visible, short["pairs"][0])
    assert torch.equal(visible, padded["pairs"][0, -7:, -7:])
    [later] = annealing([batch_of([7])], 4)
    assert not torch.equal(visible, later["pairs"][0] & visible)


@torch.no_grad()
def test_without_what_follows_the_model_is_the_causal_one(tokenizer):
    model = new_model(small_shape(), tokenizer).eval()
    causal = Qwen2ForCausalLM(model.lm.config.__class__(**model.lm.config.to_dict() | {"is_causal": True})).eval()
    causal.load_state_dict(model.lm.state_dict())
    ids = torch.arange(24).view(2, 12)
    visible = torch.ones(2, 12, 12).tril().bool()
    row, column = (index.flatten() for index in torch.meshgrid(torch.arange(2), torch.arange(1, 12), indexing="ij"))
    hidden = model.hidden(ids, *pairs_only(ids, visible), row, column)
    expected = causal(ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(model.head(hidden), expected)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 12)], dim=1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    wide = torch.ones(2, 15, 15).tril().bool()
    hidden = model.hidden(padded, positions, Visibility(attended=mask.bool(), pairs=wide), row, column + 3)
    torch.testing.assert_close(model.head(hidden), expected)


def test_a_run_anneals_the_same_in_any_layout_and_then_sees_all(small_run, default_run):
    def run(name, **changes):
        return losses(train(small_run(name, diffusion__attention_annealing_steps=6, **changes)))

    one = run("one")
    assert run("split", data__micro_batch_size_per_gpu=2) == pytest.approx(one, rel=1e-5)
    assert losses(default_run)[0] != one[0]


def test_a_run_ends_with_full_attention(small_run):
    with pytest.raises(ValueError, match=r"attention_annealing_steps=13: .* over 13 steps, and the run has 12"):
        train(small_run(diffusion__attention_annealing_steps=13))


@pytest.mark.parametrize("trait", ["windowed", "flash"])
def test_it_needs_layers_that_can_hide_any_position(small_model, trait):
    setattr(small_model, trait, True)
    ids = torch.arange(6)[None]
    with pytest.raises(ValueError, match=r"visibility: .* need "):
        small_model.hidden(ids, *pairs_only(ids, torch.ones(1, 6, 6).bool()), *ids.nonzero(as_tuple=True))


def test_a_model_with_a_window_is_refused_before_its_rows_are_read(small_run, tmp_path, tokenizer):
    config = small_run(diffusion__attention_annealing_steps=5, data__train_files=["nowhere.jsonl"])
    config.model.path = str(write_decoder("gemma3_text", tmp_path / "source", tokenizer))
    with pytest.raises(ValueError, match=r"attention_annealing_steps=5: some layers .* within a window.*set it to 0"):
        train(config)
