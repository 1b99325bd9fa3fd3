"""A stream gives the same batches in any layout, and resumes at the exact row."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data import BatchLayout, DataConfig, StreamedBatches
from diffllm import DiffusionConfig, MaskedDiffusion
from tests.trainer.runs import losses, metrics, train, weights


@pytest.fixture
def files(tmp_path):
    """47 rows in two files; every fifth is filtered out, and one is cut short."""
    names = []
    for name, rows in (("a", range(20)), ("b", range(20, 47))):
        lines = [
            json.dumps({"question": f"Solve {i}", "answer": f"<think>{'x' * (i % 4)}</think>{i}", "difficulty": i % 5})
            for i in rows
        ]
        if name == "b":
            lines.insert(3, '{"question": "cut')
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(lines) + "\n")
        names.append(str(path))
    return names


def settings(**changes):
    return {"streaming": True, "stream_window": 8, "on_bad_row": "skip", "filter": "difficulty > 0"} | changes


@pytest.fixture
def stream(files, tokenizer):
    def stream(layout=None, workers=0, **changes):
        layout = layout or BatchLayout(0, 1, 4, 1)
        config = DataConfig(train_files=files, max_length=64, num_workers=workers, **settings(**changes))
        noise = MaskedDiffusion(DiffusionConfig(), tokenizer.mask_token_id, seed=0).corrupt
        return StreamedBatches(files, config, tokenizer, layout, noise, seed=0)

    return stream


def contents(steps):
    return [[{name: tensor.tolist() for name, tensor in batch.items()} for batch in step] for step in steps]


def test_every_row_comes_once_an_epoch_in_another_order(stream):
    batches = stream()
    seen = [contents([step])[0][0]["sample_index"] for step in batches.loader(range(28))]
    numbers = np.concatenate(seen)
    assert len(set(numbers)) == 112  # numbered on and on, so that each has noise of its own
    assert sorted(numbers[:37]) == list(range(37))
    assert sorted(numbers[37:74]) == list(range(37, 74))
    assert (numbers[37:74] - 37).tolist() != numbers[:37].tolist()
    assert batches.position(28)["epoch"] == 3 == batches.epoch(28)
    assert (batches.report.kept, batches.report.read) == (117, 152)  # three times all, and a window


@pytest.mark.parametrize("workers", [0, 1])
def test_it_goes_on_where_it_was_left(stream, workers):
    expected = contents(stream().loader(range(30)))
    for done in (1, 4, 9, 10, 17, 27):
        first = stream(workers=workers)
        assert contents(first.loader(range(done))) == expected[:done]
        again = stream(workers=workers)
        again.resume(json.loads(json.dumps(first.position(done))))
        assert contents(again.loader(range(done, 30))) == expected[done:]


def test_ranks_and_micro_batches_share_the_same_batch(stream):
    def by_slot(layout):
        rows = {}
        for rank in layout:
            for step, micro_batches in enumerate(rank.loader(range(6))):
                for batch in micro_batches:
                    for i, slot in enumerate(batch["slot"].tolist()):
                        attended = batch["attention_mask"][i].bool()
                        rows[step, slot] = (batch["x_t"][i][attended].tolist(), int(batch["sample_index"][i]))
        return rows

    alone = by_slot([stream()])
    assert by_slot([stream(BatchLayout(rank, 2, 1, 2)) for rank in range(2)]) == alone


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_cannot_be_used_are_named_where_they_come(stream, workers):
    batches = stream(on_bad_row="error", workers=workers).loader(range(9))
    assert len(list(islice(batches, 3))) == 3
    with pytest.raises(ValueError, match=r"^\S*b\.jsonl:4: not JSON.*data\.on_bad_row=skip"):
        list(batches)


def test_columns_have_other_names_here(stream, files):
    expected = contents(stream().loader(range(3)))
    for file in files:
        path = Path(file)
        path.write_text(path.read_text().replace('"question"', '"asked"').replace('"answer"', '"said"'))
    columns = {"question": "asked", "answer": "said"}
    assert contents(stream(columns=columns).loader(range(3))) == expected
    with pytest.raises(
        ValueError, match=r"data\.columns={question: ask}: no row has a column 'ask'; did you mean asked"
    ):
        list(stream(columns=columns | {"question": "ask"}).loader(range(3)))


def test_unused_columns_are_counted_from_where_it_goes_on(stream, files):
    for file in files:
        path = Path(file)
        path.write_text(path.read_text().replace('"difficulty"', '"id": 1, "difficulty"'))
    first, again = stream(), stream()
    list(first.loader(range(4)))
    again.resume(first.position(4))
    list(again.loader(range(4, 5)))
    for report in (first.report, again.report):
        assert report.unused == {"id": report.read - report.dropped["cannot be used"].count}
    assert again.report.read < first.report.read


def test_nothing_left_is_an_error_and_no_endless_search(stream):
    with pytest.raises(ValueError, match=r"(?s)no row is left.*left out by data\.filter=difficulty > 9"):
        next(stream(filter="difficulty > 9").loader(range(1)))


def test_other_files_or_another_template_are_another_stream(stream, files, tokenizer, monkeypatch):
    before = stream().identity()
    assert stream().identity() == before
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", tokenizer.chat_template + " ")
        assert stream().identity() != before
    with open(files[0], "a") as file:
        file.write("\n")
    assert stream().identity() != before
    files.append("nowhere.jsonl")
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file or folder"):
        stream().identity()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subset": 3.0}, r"data\.streaming=true: data\.subset need"),
        ({"order": "curriculum"}, r"data\.streaming=true: data\.order need"),
        ({"drop_duplicates": "exact", "group_by_length": True}, r"data\.drop_duplicates, data\.group_by_length need"),
    ],
    ids=str,
)
def test_what_needs_all_rows(stream, changes, message):
    with pytest.raises(ValueError, match=message):
        stream(**changes)


def test_a_run_that_streams_and_is_interrupted_ends_with_the_same_bits(small_run, files):
    def run(name, steps):
        data = {f"data__{key}": value for key, value in settings(train_files=files, num_workers=1).items()}
        optim = {"optim__lr_schedule": "constant", "optim__warmup_steps_ratio": 0.0}
        return train(small_run(name, trainer__max_steps=steps, **data, **optim))

    whole = run("whole", 12)
    assert len(metrics(run("cut", 7))) == 7
    cut = run("cut", 12)
    assert losses(cut) == losses(whole)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(cut).items())
    assert metrics(whole)[-1]["train/epoch"] == 2.0
    accounts = json.loads((cut / "data_report.json").read_text())
    assert list(accounts) == ["training", "validation", "training after step 7"]
    for account in accounts.values():
        left_out = {reason: noted["count"] for reason, noted in account["dropped"].items()}
        assert account["kept"] + sum(left_out.values()) == account["read"] > 0
        assert account["tokens"]["response"]["p100"] > 0
    assert accounts["training"]["dropped"]["cannot be used"]["count"] == 2  # once an epoch
    trained = {name: account["trained"] for name, account in accounts.items()}
    assert trained == {"training": 7 * 8, "validation": None, "training after step 7": 5 * 8}


def test_a_stream_goes_on_in_another_directory(small_run, files):
    data = {f"data__{key}": value for key, value in settings(train_files=files).items()}
    data |= {"optim__lr_schedule": "constant", "optim__warmup_steps_ratio": 0.0}
    first = train(small_run("first", trainer__max_steps=7, **data))
    resume = str(first / "checkpoints" / "step_00000007")
    second = train(small_run("second", trainer__max_steps=9, trainer__resume=resume, **data))
    assert list(json.loads((second / "data_report.json").read_text())) == ["training after step 7", "validation"]
    assert (second / "hf").exists()


def test_a_stream_needs_to_know_its_length(small_run, files):
    config = small_run(trainer__max_steps=None)
    streamed = replace(config.data, train_files=files, streaming=True)
    with pytest.raises(ValueError, match=r"data\.streaming=true: .*give trainer\.max_steps"):
        replace(config, data=streamed)
