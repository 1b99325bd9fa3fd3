"""data.val_split holds out prompts, not rows."""

import numpy as np
import pytest

from data import DataConfig, PlacedRow, rows_of
from data.curation import held_out
from tests.data.rows import prepared, row


def test_a_prompt_is_held_out_with_all_its_rows(tokenizer):
    rows, _ = prepared(tokenizer, [row(f"question {i // 3}", answer=f"{i}") for i in range(60)])
    held = held_out(rows, 0.2, seed=1)
    assert held.reshape(-1, 3).all(1).sum() == held.reshape(-1, 3).any(1).sum() == 4
    assert np.array_equal(held, held_out(rows, 0.2, seed=1))
    assert not np.array_equal(held, held_out(rows, 0.2, seed=2))


def test_what_is_held_out_does_not_depend_on_the_order_and_grows_with_the_share(tokenizer):
    texts = [row(f"question {i}") for i in range(50)]
    rows, _ = prepared(tokenizer, texts)
    held = held_out(rows, 0.1, seed=0)
    turned, _ = prepared(tokenizer, texts[::-1])
    assert np.array_equal(held_out(turned, 0.1, seed=0)[::-1], held)
    more = held_out(rows, 0.3, seed=0)
    assert (more.sum(), (held & ~more).sum()) == (15, 0)


@pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.999, 2)])
def test_at_least_one_prompt_is_on_each_side(tokenizer, share, count):
    rows, _ = prepared(tokenizer, [row(f"question {i}") for i in range(3)])
    assert held_out(rows, share, seed=0).sum() == count


def test_one_prompt_cannot_be_split(tokenizer):
    rows, _ = prepared(tokenizer, [row(answer=str(i)) for i in range(3)])
    with pytest.raises(ValueError, match=r"data\.val_split=0\.5: .* same prompt; .*data\.val_files"):
        held_out(rows, 0.5, seed=0)


def test_every_source_keeps_rows_on_both_sides(tokenizer):
    sources = {
        "one": [row("the only question")],
        "two": [row(f"question {i}") for i in range(2)],
        "many": [row(f"other {i}") for i in range(40)],
    }
    placed = {name: [PlacedRow(each, name) for each in rows] for name, rows in sources.items()}
    rows, _ = rows_of(placed, DataConfig(), tokenizer)
    for seed in range(5):
        held = held_out(rows, 0.1, seed)
        counts = np.bincount(rows.column("source")[held], minlength=3).tolist()
        assert counts == [0, 1, 4]
