"""Block diffusion: between masked diffusion and next-token prediction, and equal to a plain loop over the blocks."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from data.packing import pack
from diffllm import block_attention, new_model
from diffllm.block_attention import attend, chunks, flex_mask
from diffllm.diffusion.block import BlockConfig, BlockDiffusion
from diffllm.diffusion.copies import side_by_side
from diffllm.diffusion.masked import DiffusionConfig, MaskedDiffusion
from sampling import Visibility
from tests.conftest import small_shape
from tests.diffllm.diffusion.test_causal import gradients

WIDTH, MASK, PROMPT = 14, 1, 3
EVEN = {"t_sampler": "stratified", "time_reweighting": "none"}


@pytest.fixture(params=["dream", "llada"])
def model(request, tokenizer):
    return new_model(small_shape(family=request.param), tokenizer).eval()


def objective(**settings):
    return BlockDiffusion(BlockConfig(**{"block_length": 4, **settings}), MASK, seed=0)


def rows(lengths=(14, 8, 6)):
    """Left-padded rows of `lengths` tokens, whose prompts have 3."""
    n, columns = len(lengths), torch.arange(WIDTH)
    first = WIDTH - torch.tensor(lengths)[:, None]
    attended = columns >= first
    return {
        "input_ids": torch.randint(10, 200, (n, WIDTH), generator=torch.Generator().manual_seed(0)),
        "maskable": columns >= first + PROMPT,
        "attention_mask": attended.long(),
        "position_ids": torch.where(attended, columns - first, 1),
        "sample_index": torch.arange(n),
        "slot": torch.arange(n),
        "batch_size": torch.full((n,), n),
    }


def alone(batch, row):
    """A row of a batch without its padding."""
    attended = batch["attention_mask"][row].bool()
    own = {name: tensor[row : row + 1] for name, tensor in batch.items()}
    return {name: tensor[:, attended] if tensor.ndim > 1 else tensor for name, tensor in own.items()}


def by_blocks(model, batch, masked, block_length):
    """nll [N] of a row's masked tokens, block by block, each with the clean blocks before it and nothing after it."""
    x_0, nlls = batch["input_ids"][0], []
    for start in range(0, len(x_0), block_length):
        end = min(start + block_length, len(x_0))
        hidden_tokens = masked[0, start:end]
        if not hidden_tokens.any():
            continue
        canvas = x_0[:end].clone()
        canvas[start:][hidden_tokens] = MASK
        position = torch.arange(end)
        sees = position[:, None] // block_length >= position // block_length
        at = start + hidden_tokens.nonzero().squeeze(-1)
        where = torch.zeros_like(at), at
        hidden = model.hidden(canvas[None], position[None], Visibility(pairs=sees[None]), *where)
        nlls.append(F.cross_entropy(model.head(hidden), x_0[at], reduction="none"))
    return torch.cat(nlls)


def test_one_block_is_masked_diffusion(model):
    one, masked = objective(block_length=WIDTH), MaskedDiffusion(DiffusionConfig(), MASK, seed=0)
    found = []
    for each in (one, masked):
        batch = each.corrupt(rows(), epoch=3)
        output = each.loss(model, batch)
        (output.loss / each.denominator(batch)).backward()
        found.append((output.loss.detach(), gradients(model), each.measure(batch, output), batch["x_t"]))
    (loss, gradient, sums, x_t), (expected, expected_gradient, expected_sums, expected_x_t) = found
    assert torch.equal(x_t, expected_x_t)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-6, atol=1e-6)
    for name in gradient:
        torch.testing.assert_close(gradient[name], expected_gradient[name], rtol=1e-5, atol=1e-6)


def test_blocks_of_one_token_all_masked_are_next_token_prediction(tokenizer):
    """Of a family whose logits are shifted: a token is predicted from the clean token before it."""
    model = new_model(small_shape(), tokenizer).eval()
    one = objective(block_length=1, **EVEN)
    batch = alone(one.corrupt(rows(), epoch=0), 0)
    batch["masked"], batch["weights"] = batch["maskable"], batch["maskable"].float()
    x_0, position = batch["input_ids"], batch["position_ids"]
    causal = Visibility(pairs=position[:, :, None] >= position[:, None, :])
    at = torch.arange(PROMPT, WIDTH)
    logits = model.lm(input_ids=x_0, attention_mask=causal.dense()[:, None], position_ids=position).logits
    expected = F.cross_entropy(logits[0, at - 1], x_0[0, at], reduction="none")
    torch.testing.assert_close(one.loss(model, batch).nll, expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{"t_sampler": "stratified"}, EVEN, {**EVEN, "complementary": True}])
def test_loss_and_gradient_are_those_of_a_loop_over_blocks(model, settings):
    ours = objective(**settings)
    batch = alone(ours.corrupt(rows(), epoch=1), 0)
    copies = ours.masked_copies(batch)
    nll = torch.cat([by_blocks(model, batch, copies[:, copy], 4) for copy in range(copies.shape[1])])
    weights = torch.cat([batch["weights"][copies[:, copy]] for copy in range(copies.shape[1])])
    expected = (weights * nll).sum()
    expected.backward()
    expected_gradient = gradients(model)
    output = ours.loss(model, batch)
    output.loss.backward()
    torch.testing.assert_close(output.nll, nll.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradient[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [EVEN, {**EVEN, "complementary": True}])
def test_padding_packing_and_company_change_nothing(model, settings):
    ours = objective(**settings)
    batch = ours.corrupt(rows(), epoch=0)
    each = [ours.loss(model, alone(batch, row)) for row in range(len(batch["x_t"]))]
    together = ours.loss(model, batch)
    torch.testing.assert_close(together.nll, torch.cat([one.nll for one in each]), rtol=1e-5, atol=1e-5)
    packed = pack(batch, WIDTH)
    assert len(packed["x_t"]) < len(batch["x_t"])
    torch.testing.assert_close(ours.loss(model, packed).loss, together.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.denominator(packed), ours.denominator(batch))
    sums = [ours.measure(*pair) for pair in ((packed, ours.loss(model, packed)), (batch, together))]
    torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-5)


def test_a_row_has_the_same_noise_in_any_batch():
    ours = objective()
    batch = ours.corrupt(rows(), epoch=2)
    for row in range(len(batch["x_t"])):
        own = ours.corrupt({name: tensor[row : row + 1] for name, tensor in rows().items()}, epoch=2)
        for name in ("x_t", "masked", "t", "weights", "importance", "block"):
            assert torch.equal(own[name][0], batch[name][row]), name


def test_stratified_times_cover_their_range_in_each_row_and_over_the_rows():
    ours, n = objective(block_length=2, **EVEN), 6
    batch = ours.corrupt({**rows((14,) * n), "batch_size": torch.full((n,), n)}, epoch=0)
    blocks = 6  # of the response, the first of them half in the prompt
    t = batch["t"][:, PROMPT - 1 :: 2]
    eps = ours.config.eps
    uniform = ((t - eps) / (1 - eps)).double()
    assert t.shape == (n, blocks)
    assert torch.equal(torch.sort((uniform * blocks).long(), dim=1).values, torch.arange(blocks).expand(n, -1))
    assert sorted((uniform * blocks * n).long().flatten().tolist()) == list(range(blocks * n))
    assert torch.equal(batch["t"][:, PROMPT - 1 :: 2], batch["t"][:, PROMPT::2])  # one t a block


def test_complementary_copies_mask_each_response_token_once():
    ours = objective(complementary=True, loss_norm="masked", **EVEN)
    batch = ours.corrupt(rows(), epoch=0)
    first, second = ours.masked_copies(batch).unbind(1)
    assert not (first & second).any()
    assert torch.equal(first | second, batch["maskable"])
    assert torch.equal(batch["weights"], batch["maskable"].float())
    assert ours.denominator(batch) == batch["maskable"].sum()
    assert len(ours.positions(batch)[0]) == batch["maskable"].sum()
    linear = objective(complementary=True, time_reweighting="original", t_sampler="stratified").corrupt(rows(), 0)
    torch.testing.assert_close(linear["weights"], batch["maskable"] / linear["t"])


def test_mask_ratio_bounds_the_times_of_training_alone():
    ours = objective(mask_ratio=[0.3, 0.8], eps=1e-2, **EVEN)
    t = ours.corrupt(rows(), epoch=0)["t"][rows()["maskable"]]
    assert t.min() >= 0.3
    assert t.max() <= 0.8
    validation = ours.for_validation(1)
    assert validation.config == replace(BlockConfig(), block_length=4, eps=1e-2)
    sums = [1.0] * 11
    assert "elbo" not in ours.metrics(sums)
    assert {*validation.metrics(sums)} - {*ours.metrics(sums)} == {"elbo", "perplexity_bound"}
    whole = objective(mask_ratio=[1.0, 1.0], **EVEN).corrupt(rows(), epoch=0)
    assert torch.equal(whole["masked"], whole["maskable"])


@pytest.mark.parametrize(
    "settings",
    [{}, EVEN, {**EVEN, "t_sampler": "cosine"}, {**EVEN, "mask_ratio": [0.3, 0.5]}, {**EVEN, "complementary": True}],
)
def test_the_share_of_the_tokens_in_the_loss_is_the_stated_one(settings):
    ours, n = objective(block_length=2, **settings), 400
    batch = ours.corrupt({**rows((14,) * n), "slot": torch.arange(n), "batch_size": torch.full((n,), n)}, epoch=0)
    share = len(ours.positions(batch)[0]) / batch["maskable"].sum()
    assert share == pytest.approx(ours.config.loss_share, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"block_length": 0}, r"diffusion\.block_length=0"),
        ({"mask_ratio": [0.0, 0.5]}, r"diffusion\.mask_ratio=\[0\.0, 0\.5\]"),
        ({"mask_ratio": [0.8, 0.3], **EVEN}, r"diffusion\.mask_ratio=\[0\.8, 0\.3\]"),
        ({"time_reweighting": "cart"}, r"diffusion\.time_reweighting=cart.*none, original or linear"),
        ({"mask_ratio": [0.3], **EVEN}, r"diffusion\.mask_ratio=\[0\.3\]"),
        ({"mask_ratio": [0.3, 0.8]}, r"diffusion\.mask_ratio=.*t_sampler"),
        ({"complementary": True, "t_sampler": "cosine"}, r"diffusion\.complementary=True.*t_sampler"),
        ({"attention_annealing_steps": 5}, r"diffusion\.attention_annealing_steps=5"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        BlockConfig(**settings)


@pytest.mark.parametrize("settings", [EVEN, {**EVEN, "complementary": True}])
@pytest.mark.parametrize("queries", [3, 256])
def test_attention_by_parts_needs_no_mask_of_the_canvas(tokenizer, monkeypatch, settings, queries):
    """Padded and packed, the loss and gradient are those of a dense mask."""
    monkeypatch.setattr(block_attention, "QUERIES", queries)
    ours, found = objective(**settings), []
    for attention in ("sdpa", "varlen"):
        model = new_model(small_shape(attn_implementation=attention, num_key_value_heads=1), tokenizer)
        batch = ours.corrupt(rows(), epoch=0)
        for each in (batch, pack(batch, WIDTH)):
            output = ours.loss(model, each)
            output.loss.backward()
            found.append((output, gradients(model)))
    for dense, parts in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(parts[0].nll, dense[0].nll, rtol=1e-5, atol=1e-5)
        for name, gradient in parts[1].items():
            torch.testing.assert_close(gradient, dense[1][name], rtol=1e-4, atol=1e-5)


def with_masks(columns):
    """A row of four blocks of 4, and bool [1, 1, 16]: whether its noised copy masks a token."""
    batch = {"attention_mask": torch.ones(1, 16, dtype=torch.long), "block": (torch.arange(16) // 4)[None]}
    masked = torch.zeros(1, 1, 16, dtype=torch.bool)
    masked[..., columns] = True
    return batch, masked


def test_parts_hold_the_columns_that_their_queries_see(monkeypatch):
    monkeypatch.setattr(block_attention, "QUERIES", 8)
    seen = side_by_side(*with_masks([0, 4, 8, 12])).visibility
    assert [(chunk.queries, chunk.columns) for chunk in chunks(seen)] == [
        (slice(0, 8), [slice(0, 8)]),
        (slice(8, 12), [slice(0, 12)]),
        (slice(12, 20), [slice(0, 4), slice(12, 20)]),
        (slice(20, 28), [slice(0, 12), slice(20, 28)]),
    ]


@pytest.mark.parametrize(
    ("masked", "clean", "noised"),
    [
        ([5, 9], [0, 1], [1, 2]),  # as after a prompt of one block, with nothing masked in the last
        ([2], [], [0]),
        ([15], [0, 1, 2], [3]),
        ([], [0, 1, 2, 3], []),  # a query must see something
    ],
)
def test_blocks_that_no_masked_token_depends_on_are_left_out(masked, clean, noised):
    batch, masks = with_masks(masked)
    canvas = side_by_side(batch, masks)
    blocks = batch["block"][0, canvas.column[0, ::4]].tolist()
    assert blocks == [*clean, *noised]
    assert canvas.visibility.copy[0, ::4].tolist() == [0] * len(clean) + [1] * len(noised)
    assert canvas.column[canvas.masked].tolist() == masked


@pytest.mark.parametrize("settings", [{}, EVEN, {**EVEN, "complementary": True}])
def test_a_canvas_has_the_positions_that_are_counted(settings):
    """Blocks are shorter than rows, or longer."""
    for block_length, lengths in product((4, 20), ((14, 8, 6), (5, 4, 4))):
        ours = objective(**settings, block_length=block_length)
        batch = ours.corrupt(rows(lengths), epoch=0)
        for each in (batch, pack(batch, WIDTH)):
            canvas = side_by_side(each, ours.masked_copies(each))
            row, column = ours.positions(each)
            assert torch.equal(canvas.masked.nonzero()[:, 0], row)
            assert torch.equal(canvas.column[canvas.masked], column)
            computed, pairs = ours.computed(each)
            assert computed == canvas.attended.sum() < ours.config.copies * each["attention_mask"].sum()
            seen = canvas.visibility.dense().broadcast_to(*canvas.attended.shape, -1)[canvas.attended]
            assert pairs == seen.sum()


@pytest.mark.parametrize("complementary", [False, True])
def test_flex_attention_sees_what_a_dense_mask_shows(complementary):
    """On a CPU it has a forward only."""
    ours = objective(complementary=complementary, **EVEN)
    for batch in (ours.corrupt(rows(), epoch=0), pack(ours.corrupt(rows(), epoch=0), WIDTH)):
        seen = side_by_side(batch, ours.masked_copies(batch)).visibility
        query, key, value = torch.randn(3, *seen.block.shape, 2, 16).transpose(2, 3)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen.dense()[:, None])
        found = attend(query, key, value, flex_mask(seen), None)
        torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_blocks_grow_over_the_steps():
    ours = objective(block_warmup=[1, 2], block_warmup_steps=10)
    for step, length in ((0, 1), (9, 1), (10, 2), (19, 2), (20, 4), (99, 4)):
        batch = ours.corrupt({**rows(), "step": torch.full((3,), step)}, epoch=0)
        assert torch.equal(batch["block"][0], torch.arange(WIDTH) // length)
    assert torch.equal(ours.corrupt(rows(), epoch=0)["block"][0], torch.arange(WIDTH) // 4)  # of validation
    assert ours.config.attention == "by blocks of 1 to step 10, 2 to step 20, then 4; x_0 beside a noised copy"
    with pytest.raises(ValueError, match=r"diffusion\.block_warmup=\[1\].*block_warmup_steps"):
        BlockConfig(block_warmup=[1])
