"""Rows of files are tokenized once, and an entry of the cache is whole or absent."""

import multiprocessing
import os
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest

from data import DataConfig, rows_of_files
from data.encode import encode
from diffllm.tokenizer import builtin_tokenizer
from tests.data.rows import prepared, questions, row, write


class TestCache:
    @pytest.fixture
    def files(self, tmp_path):
        return [write(tmp_path / "a.jsonl", row("one"), row("two")), write(tmp_path / "b.jsonl", row("three"))]

    @pytest.fixture
    def load(self, files, tmp_path, tokenizer):
        def load(**settings):
            config = DataConfig(cache_dir=str(tmp_path / "cache"), **settings)
            return rows_of_files(files, config, tokenizer, "training", True)

        return load

    def entries(self, tmp_path):
        return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir())

    def test_rows_are_the_same_from_memory_and_from_disk(self, load, files, tokenizer):
        rows = [row("one"), row("two"), row("three")]
        expected, _ = prepared(tokenizer, rows)
        for _ in range(2):
            tokens, report = load()
            assert [tokens.ids(i).tolist() for i in range(3)] == [expected.ids(i).tolist() for i in range(3)]
            assert tokens.column("source").tolist() == [0, 0, 1]
            assert [tokens.place(i) for i in range(3)] == [f"{files[0]}:1", f"{files[0]}:2", f"{files[1]}:1"]
            assert (report.read, report.kept, list(report.sources.values())) == (3, 3, [2, 1])

    def test_the_second_time_nothing_is_tokenized(self, load, tmp_path, monkeypatch):
        first = load()[0].fingerprint()
        monkeypatch.setattr("data.preparation.encode", None)
        assert load()[0].fingerprint() == first

    def test_anything_that_changes_the_rows_makes_new_ones(self, load, files, tmp_path, tokenizer, monkeypatch):
        load()
        for settings in ({"max_length": 99}, {"loss_on": "all"}, {"filter": "prompt_tokens > 1"}):
            before = self.entries(tmp_path)
            load(**settings)
            assert len(self.entries(tmp_path)) == len(before) + 1
        load(subset=0.5, train_batch_size=2)  # what does not concern tokens
        assert len(self.entries(tmp_path)) == 4
        write(Path(files[1]), row("four"))
        assert questions(load()[0], tokenizer) == ["one", "two", "four"]
        monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + " ")
        load()
        assert len(self.entries(tmp_path)) == 6

    def test_other_columns_make_other_rows(self, tmp_path, tokenizer):
        file = write(tmp_path / "a.jsonl", {"first": "one", "second": "two"})
        made = []
        for columns in ({"prompt": "first", "response": "second"}, {"prompt": "second", "response": "first"}):
            config = DataConfig(cache_dir=str(tmp_path / "cache"), columns=columns)
            made += questions(rows_of_files([file], config, tokenizer, "training", True)[0], tokenizer)
        assert made == ["one", "two"]

    def test_validation_rows_are_not_made_anew_by_what_is_not_theirs(self, files, tmp_path, tokenizer):
        for settings in ({}, {"filter": "False", "order": "curriculum", "drop_duplicates": "exact"}):
            config = DataConfig(cache_dir=str(tmp_path / "cache"), **settings)
            rows_of_files(files, config, tokenizer, "validation", curated=False)
        assert len(self.entries(tmp_path)) == 1

    def test_the_order_of_the_files_is_part_of_the_rows(self, load, files, tmp_path, tokenizer):
        assert load()[0].column("source").tolist() == [0, 0, 1]
        files.reverse()
        assert load()[0].column("source").tolist() == [0, 1, 1]

    def test_a_file_is_given_once(self, load, files):
        with pytest.raises(ValueError, match=r"data\.train_files: .*a\.jsonl given twice"):
            DataConfig(train_files=[files[0], files[0]])

    def test_other_users_can_read_it_and_wait_for_it(self, load, tmp_path):
        load()
        [entry] = self.entries(tmp_path)
        assert (tmp_path / "cache" / entry).stat().st_mode & 0o555 == 0o555
        assert (tmp_path / "cache" / f"{entry}.lock").stat().st_mode & 0o666 == 0o666

    def test_what_a_killed_process_left_is_cleared(self, load, tmp_path):
        first = load()[0].fingerprint()
        [entry] = self.entries(tmp_path)
        (tmp_path / "cache" / entry).rename(tmp_path / "cache" / f"{entry}.unfinished")
        (tmp_path / "cache" / f"{entry}.unfinished" / "rows.arrow").write_bytes(b"half")
        assert load()[0].fingerprint() == first
        assert self.entries(tmp_path) == [entry]

    def test_a_broken_entry_is_named(self, load, tmp_path):
        load()
        [entry] = self.entries(tmp_path)
        rows = tmp_path / "cache" / entry / "rows.arrow"
        rows.write_bytes(rows.read_bytes()[:100])
        with pytest.raises(ValueError, match=rf"{entry}: these tokenized rows cannot be read .*; delete the directory"):
            load()

    def test_an_entry_that_ends_between_two_batches(self, load, files, tmp_path):
        write(Path(files[0]), *[row()] * 1000)
        load()
        [entry] = self.entries(tmp_path)
        rows = tmp_path / "cache" / entry / "rows.arrow"
        with pa.ipc.open_stream(rows.read_bytes()) as read:
            first, schema = read.read_next_batch(), read.schema
        with pa.ipc.new_stream(str(rows), schema) as written:
            written.write(first)
        with pytest.raises(ValueError, match=rf"{entry}: .*it has 1000 of 1001 rows.*; delete the directory"):
            load()

    def test_files_that_change_while_they_are_read(self, load, files, tmp_path, monkeypatch):
        def changed(chats, *others):
            write(Path(files[1]), row("four"))
            return encode(chats, *others)

        with monkeypatch.context() as patch:
            patch.setattr("data.preparation.encode", changed)
            with pytest.raises(ValueError, match="changed while they were read"):
                load()
        assert self.entries(tmp_path) == []

    def test_nothing_half_built_is_ever_used(self, load, files, tmp_path, tokenizer, monkeypatch):
        def interrupted(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("os.rename", interrupted)
            with pytest.raises(KeyboardInterrupt):
                load()
        assert self.entries(tmp_path) == []
        assert len(load()[0]) == 3

    @pytest.mark.parametrize("name", ["rows.arrow", "report.json"])
    def test_a_flipped_byte_is_noticed(self, load, files, tmp_path, name):
        load()
        [file] = (tmp_path / "cache").glob(f"*/{name}")
        content = file.read_bytes()
        for place in range(0, len(content), 97):
            file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            if name == "rows.arrow":
                with pytest.raises(ValueError, match=f"{file.parent}: these tokenized rows cannot be read"):
                    load()
            else:
                with suppress(ValueError):  # of a number it is another number
                    load()

    @pytest.mark.parametrize("report", ["null", "[1]", "{}", '{"digest": 1, "report": {}}', '{"report": {"kept": 3}}'])
    def test_a_broken_report_is_named(self, load, files, tmp_path, report):
        load()
        [file] = (tmp_path / "cache").glob("*/report.json")
        file.write_text(report)
        with pytest.raises(ValueError, match=f"{file.parent}: these tokenized rows cannot be read"):
            load()

    def test_several_processes_make_it_once(self, load, files, tmp_path):
        context = multiprocessing.get_context("fork")
        config = DataConfig(cache_dir=str(tmp_path / "cache"))
        with context.Pool(3) as pool:
            prints = pool.starmap(_fingerprint, [(files, config, str(tmp_path / "builds"))] * 3)
        assert len(set(prints)) == 1
        assert len((tmp_path / "builds").read_text().split()) == 1


def _fingerprint(files, config, builds):
    import data.token_cache

    build = data.token_cache._build

    def counted(*args):
        with open(builds, "a") as log:
            log.write(f"{os.getpid()}\n")
        build(*args)

    data.token_cache._build = counted
    return rows_of_files(files, config, builtin_tokenizer(), "training", True)[0].fingerprint()
