"""The bound on the log-likelihood, against sums over all masks and all orders of a made-up model."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffllm import new_model
from sampling import choose, score, score_positions
from tests.conftest import small_shape
from tests.sampling.models import MASK, SPECIAL, MockDenoiser, V, unpadded

PROMPT, RESPONSE = [1, 2], [3, 4, 5, 6, 7, 8, 0, 3, 1]


class Neighbours(MockDenoiser):
    """Says 3 everywhere, the surer the more neighbours are clean: scores vary smoothly with the masks."""

    def hidden(self, x_t, position_ids, visibility, row, column, cache=None):
        clean = torch.nn.functional.pad((x_t != MASK).float(), (1, 1))
        logits = torch.zeros(len(row), V)
        logits[:, 3] = 2 * (clean[row, column] + clean[row, column + 2])
        return logits


class Counting(MockDenoiser):
    """Says 3 everywhere, the surer the fewer tokens are masked: what is masked makes no difference."""

    def hidden(self, x_t, position_ids, visibility, row, column, cache=None):
        logits = torch.zeros(len(row), V)
        logits[:, 3] = 4 - 0.5 * (x_t == MASK).sum(-1)[row]
        return logits


def log_p(tokens, masked, model=None):
    """Σ log p of the masked tokens, of one row."""
    x_t, at = torch.tensor([tokens]), torch.tensor(sorted(masked))
    x_t[0, at] = MASK
    logits = (model or MockDenoiser()).hidden(x_t, *unpadded(x_t), torch.zeros_like(at), at)
    return logits.log_softmax(-1)[torch.arange(len(at)), torch.tensor(tokens)[at]].double().sum().item()


def exact(tokens, at, model=None):
    """Σ over masks of B(m, n-m+1) · Σ log p, with B(a, b) = Γ(a)Γ(b)/Γ(a+b)."""
    n = len(at)
    return sum(
        math.gamma(m) * math.gamma(n - m + 1) / math.gamma(n + 1) * log_p(tokens, masked, model)
        for m in range(1, n + 1)
        for masked in itertools.combinations(at, m)
    )


@pytest.fixture(scope="module")
def truth():
    return exact([*PROMPT, *RESPONSE], range(len(PROMPT), len(PROMPT) + len(RESPONSE)))


def test_one_token_has_its_log_probability():
    model = MockDenoiser()
    result = score(model, PROMPT, [3], SPECIAL, samples=2)
    assert result.mean == pytest.approx(log_p([*PROMPT, 3], [2]))
    assert (result.standard_error, result.tokens, model.calls) == (0, 1, 1)


def test_short_responses_are_exact():
    result = score(MockDenoiser(), PROMPT, [3, 4, 5], SPECIAL, samples=8)
    assert result.mean == pytest.approx(exact([*PROMPT, 3, 4, 5], [2, 3, 4]))
    assert (result.standard_error, result.tokens) == (0, 3)
    assert result.per_token == result.mean / 3


def test_the_bound_is_the_mean_of_the_log_likelihoods_in_every_order():
    tokens, at = [*PROMPT, 3, 4, 5], [2, 3, 4]
    orders = []
    for order in itertools.permutations(at):
        chain = 0.0  # log p of each token while it and those after it in the order are masked
        for place in range(3):
            x_t, column = torch.tensor([tokens]), torch.tensor([order[place]])
            x_t[0, list(order[place:])] = MASK
            logits = MockDenoiser().hidden(x_t, *unpadded(x_t), torch.tensor([0]), column)
            chain += logits.log_softmax(-1)[0, tokens[order[place]]].item()
        orders.append(chain)
    assert score(MockDenoiser(), PROMPT, [3, 4, 5], SPECIAL).mean == pytest.approx(np.mean(orders))


@pytest.mark.parametrize("samples", [2, 6])
def test_three_tokens_with_fewer_samples_than_masks(samples):
    """The mean of 400 seeds lies within 5 standard errors: false alarm below one in a million."""
    truth = exact([*PROMPT, 3, 4, 5], [2, 3, 4])
    scores = [score(MockDenoiser(), PROMPT, [3, 4, 5], SPECIAL, samples, seed).mean for seed in range(400)]
    assert abs(np.mean(scores) - truth) < 5 * np.std(scores, ddof=1) / 20


def test_an_estimate_lies_within_its_error(truth):
    """At 128 pairs 5 standard errors are missed once in a million."""
    result = score(MockDenoiser(), PROMPT, RESPONSE, SPECIAL, samples=256)
    assert 0 < result.standard_error < 0.1 * abs(truth)
    assert abs(result.mean - truth) < 5 * result.standard_error


@pytest.mark.parametrize("model", [MockDenoiser(), Neighbours()])
def test_the_standard_error_is_the_spread_between_seeds(model):
    """Of 300 estimates, known to 4 %. The spread of all draws would give `Neighbours` nearly three times as much."""
    scores = [score(model, PROMPT, [3] * 12, SPECIAL, 16, seed) for seed in range(300)]
    spread = np.std([result.mean for result in scores], ddof=1)
    reported = np.sqrt(np.mean([result.standard_error**2 for result in scores]))
    assert reported == pytest.approx(spread, rel=0.2)


def test_the_standard_error_falls_with_the_root_of_the_samples():
    def error(samples):
        scores = [score(MockDenoiser(), PROMPT, RESPONSE, SPECIAL, samples, seed) for seed in range(50)]
        return np.sqrt(np.mean([result.standard_error**2 for result in scores]))

    assert error(16) / error(256) == pytest.approx(4, rel=0.15)


def test_numbers_of_masks_are_stratified():
    """With a stratum for each number nothing is left to chance where only the number matters."""
    result = score(Counting(), PROMPT, [3] * 8, SPECIAL, samples=16)
    assert result.standard_error == pytest.approx(0, abs=1e-6)
    assert result.mean == pytest.approx(exact([*PROMPT, *[3] * 8], range(2, 10), Counting()))
    assert score(Counting(), PROMPT, [3] * 8, SPECIAL, samples=14).standard_error > 0.01


def test_alternatives_share_their_noise():
    """The difference between two lengths varies less than half as much as with noise of their own."""
    longer, shorter, others = (
        np.array([score(Neighbours(), PROMPT, [3] * n, SPECIAL, 8, seed).per_token for seed in seeds])
        for n, seeds in ((11, range(100)), (10, range(100)), (10, range(100, 200)))
    )
    assert np.std(longer - shorter) < 0.5 * np.std(longer - others)


def test_neither_batch_nor_padding_changes_a_score():
    responses = [RESPONSE, RESPONSE[:8], [3], [*RESPONSE, 2, 2]]
    for batch_size in (1, 7, 1000):
        together = choose(MockDenoiser(), PROMPT, responses, SPECIAL, seed=3, batch_size=batch_size).scores
        assert together == [score(MockDenoiser(), PROMPT, response, SPECIAL, seed=3) for response in responses]


def test_neither_batch_nor_padding_changes_a_score_of_a_model(small_model):
    responses, special = [[*b"three"], [*b"seventeen"]], small_model.special_tokens
    together = choose(small_model, [*b"2 + 1 ="], responses, special, samples=8, batch_size=16).scores
    for result, response in zip(together, responses, strict=True):
        alone = score(small_model, [*b"2 + 1 ="], response, special, samples=8, batch_size=1)
        assert result.mean == pytest.approx(alone.mean, rel=1e-5)


def test_ragged_rows_are_right_aligned():
    seen = []

    class Watched(MockDenoiser):
        def hidden(self, x_t, position_ids, visibility, row, column, cache=None):
            seen.extend((x_t.tolist(), visibility.attended.tolist(), position_ids.tolist()))
            return super().hidden(x_t, position_ids, visibility, row, column)

    score_positions(Watched(), [([1, 2, 3], [1]), ([4], [0])], SPECIAL)
    assert seen == [[[1, MASK, 3], [MASK] * 3], [[1, 1, 1], [0, 0, 1]], [[0, 1, 2], [1, 1, 0]]]


def test_the_head_sees_masked_positions_only_and_a_part_at_once(monkeypatch):
    seen = []

    class Watched(MockDenoiser):
        def head(self, hidden):
            seen.append(len(hidden))
            return super().head(hidden)

    monkeypatch.setattr("sampling.likelihood.positions_at_once", lambda model: 5)
    parts = score(Watched(), PROMPT, [3, 4, 5], SPECIAL)
    assert max(seen) == 5
    assert sum(seen) == 12  # 3 masks of one position, 3 of two, 1 of three
    monkeypatch.undo()
    assert parts == score(MockDenoiser(), PROMPT, [3, 4, 5], SPECIAL)


def test_positions_anywhere_given_the_rest():
    tokens, at = [3, 4, 5, 6, 7, 8], [4, 0, 2]
    masked_elsewhere = [3, MASK, 5, 6, 7, 8]
    known, unknown = score_positions(MockDenoiser(), [(tokens, at), (masked_elsewhere, at)], SPECIAL)
    assert known.mean == pytest.approx(exact(tokens, at))
    assert unknown.mean == pytest.approx(exact(masked_elsewhere, at))
    assert score_positions(MockDenoiser(), [], SPECIAL) == []


def test_the_seed_decides_the_draws():
    first, again, other = (score(MockDenoiser(), PROMPT, RESPONSE, SPECIAL, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_the_best_response():
    choice = choose(Neighbours(), [3], [[4, 3], [3], [3, 3, 3, 3], [3]], SPECIAL)
    assert choice.best == 1  # of equal ones the first
    totals = [result.mean for result in choice.scores]
    assert totals[1] == max(totals) > totals[2]
    assert choice.best_per_token == np.argmax([result.per_token for result in choice.scores])


@pytest.mark.parametrize(
    ("tokens", "at", "message"),
    [([1], [], "row 1 has no tokens to score"), ([1, MASK], [1], f"row 1 has the mask token {MASK} at position 1"),
     ([1, 2], [2], r"row 1: positions \[2\]"), ([1, 2], [-1], r"row 1: positions \[-1\]"),
     ([1, 2], [0, 0], r"row 1: positions \[0, 0\] must differ and lie in 0 … 1")],
)  # fmt: skip
def test_rows_that_cannot_be_scored(tokens, at, message):
    with pytest.raises(ValueError, match=message):
        score_positions(MockDenoiser(), [([1], [0]), (tokens, at)], SPECIAL)


@pytest.mark.parametrize(
    ("field", "value"), [("samples", 0), ("samples", 1), ("samples", 7), ("batch_size", 0), ("seed", -1)]
)
def test_settings_outside_their_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}: must"):
        score(MockDenoiser(), PROMPT, RESPONSE, SPECIAL, **{field: value})


def test_responses_that_cannot_be_chosen_from():
    with pytest.raises(ValueError, match="responses is empty"):
        choose(MockDenoiser(), PROMPT, [], SPECIAL)
    with pytest.raises(ValueError, match="row 0 has no tokens"):
        score(MockDenoiser(), PROMPT, [], SPECIAL)


@pytest.fixture
def decoder(tokenizer):
    return new_model(small_shape(initializer_range=0.3), tokenizer).double().eval()


def test_with_blocks_of_one_token_it_is_the_autoregressive_likelihood(decoder):
    """Of a family that predicts a token from the one before it."""
    row = torch.tensor([[5, 6, 7, 40, 41, 42, 43]])
    sees = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        logits = decoder.lm(input_ids=row, attention_mask=sees).logits
    expected = logits[0, 2:-1].log_softmax(-1).gather(1, row[0, 3:, None]).sum().item()
    decoder.block_length = 1
    found = score(decoder, [5, 6, 7], [40, 41, 42, 43], decoder.special_tokens)
    assert found.mean == pytest.approx(expected, rel=1e-6)
    assert (found.standard_error, found.tokens, found.nfe) == (0.0, 4, 4)


def test_by_blocks_it_is_the_sum_of_the_blocks_each_given_the_clean_ones_before(decoder):
    row, special = [5, 6, 7, 40, 41, 42, 43, 44], decoder.special_tokens
    decoder.block_length = 4
    parts = [score_positions(decoder, [(row[:end], at)], special)[0] for end, at in ((4, [3]), (8, [4, 5, 6, 7]))]
    whole = score(decoder, row[:3], row[3:], special)
    assert whole.mean == pytest.approx(sum(part.mean for part in parts), rel=1e-9)
    assert (whole.standard_error, whole.nfe) == (0.0, 1 + 15)
    decoder.block_length = 8
    one_block = score(decoder, row[:3], row[3:], special)
    decoder.block_length = None
    assert one_block.mean == pytest.approx(score(decoder, row[:3], row[3:], special).mean, rel=1e-9)


def test_blocks_draw_their_own_masks_so_that_their_errors_are_independent():
    """Ten equal blocks: the spread over seeds is the error that is reported, not √10 times it."""
    model = Counting()
    model.block_length = 16
    row = [1] * 16 + [3] * 160
    found = [score(model, row[:16], row[16:], SPECIAL, samples=16, seed=seed) for seed in range(60)]
    spread = np.std([each.mean for each in found])
    reported = np.mean([each.standard_error for each in found])
    assert 0.6 < spread / reported < 1.6
