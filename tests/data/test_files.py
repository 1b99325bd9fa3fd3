"""Every file that cannot be used is refused with its place."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from data import read_rows
from data.chat import final_answer, to_chat, to_prompt
from data.files import digest, outline
from tests.conftest import no_longer_than

ROW = {"question": "2+2?", "answer": "<think>\n2+2=4\n</think>\n4", "source": "made up", "difficulty": 1}


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_jsonl_and_parquet_rows_come_in_order_with_their_place(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", json.dumps(ROW), "", json.dumps(ROW | {"question": "3?"}))
    parquet = tmp_path / "b.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([ROW]), parquet)
    rows = read_rows([jsonl, parquet])
    assert [placed.row["question"] for placed in rows] == ["2+2?", "3?", "2+2?"]
    assert [placed.place for placed in rows] == [f"{jsonl}:1", f"{jsonl}:3", f"{parquet}:1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file or folder"),
        ("empty.jsonl", "", "it has no rows"),
        ("bad.jsonl", '{"question": "a"}\n{"question": \n', r"bad\.jsonl:2: not JSON"),
        ("list.jsonl", "[1]\n", r"list\.jsonl:1: a row is a JSON object, this is list"),
        ("rows.csv", "a,b\n", r"end in \.jsonl, \.json, \.parquet"),
        ("bad.parquet", "PAR1", "not a readable parquet file"),
        ("object.json", '{"question": "a"}', "not a list of rows in JSON, .*is it .jsonl"),
        ("cut.json", '[{"question": "a"}, {"question"', "from row 2 on"),
        ("more.json", '[{"question": "a"}] x', "something follows the list, at character 19"),
        ("apart.json", '[{"question": "a"} {"question": "b"}]', "expected , or ] at character 19"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows([tmp_path / name])


def test_rows_of_a_json_list_are_named_one_by_one(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"question": "\xff"}, {"a": 1, "a": 2}, 3, {"question": "4"}]')
    with pytest.raises(
        ValueError, match=r"3 rows .*\n.*a\.json:1: .*utf-8.*\n.*a\.json:2: .*a given twice.*\n.*a\.json:3: .*int"
    ):
        read_rows([tmp_path / "a.json"])


def test_a_row_with_very_many_fields_takes_no_time(tmp_path):
    fields = ", ".join(f'"f{i}": {i}, "f{i}": {i}' for i in range(100_000))  # a second at most; by pairs, an hour
    with no_longer_than(20), pytest.raises(ValueError, match=r"f0, f1, .* and 99990 more given twice"):
        read_rows([write(tmp_path / "a.jsonl", f"{{{fields}}}")])


def test_a_parquet_value_that_cannot_be_read(tmp_path):
    times = pa.array([0, 2**62], pa.timestamp("us"))
    pa.parquet.write_table(pa.table({"question": ["a", "b"], "when": times}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:2: cannot be read"):
        read_rows([tmp_path / "a.parquet"])


def test_a_folder_of_several_splits(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}-00000.jsonl", json.dumps(ROW | {"source": split}))
    with pytest.raises(ValueError, match=rf"name one of its splits: {tmp_path}:test or {tmp_path}:train$"):
        read_rows([tmp_path])
    with pytest.raises(ValueError, match=rf"no file of the folder belongs to a split dev; name one .*{tmp_path}:test"):
        read_rows([f"{tmp_path}:dev"])
    [placed] = read_rows([f"{tmp_path}:test"])
    assert placed.row["source"] == "test"
    assert digest(f"{tmp_path}:test") != digest(f"{tmp_path}:train")
    assert [name for name, *_ in outline(f"{tmp_path}:test")] == [str(tmp_path / "test-00000.jsonl")]


@pytest.mark.parametrize(
    ("names", "asked", "read"),
    [
        (["train_sft-00000-of-00001", "train_gen-00000-of-00001"], ":train_sft", [0]),
        (["Train-00000-of-00001", "Test-00000-of-00001"], ":train", [0]),
        (["a-train-00000-of-00001", "a-test-00000-of-00001"], ":test", [1]),
        (["train-math-00000-of-00001", "train-code-00000-of-00001"], "", [1, 0]),
        (["train/part-00000-of-00001", "test/part-00000-of-00001"], ":train", [0]),
        (["2023/a", "2024/b", "c"], "", [0, 1, 2]),
        (["main/train", "socratic/train"], "/main:train", [0]),
    ],
    ids=str,
)
def test_files_of_folders(tmp_path, names, asked, read):
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.jsonl", json.dumps(ROW | {"source": number}))
    for other in ("dataset_infos.json", "README.md", "stats.csv", ".cache/train.jsonl"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("{}")
    assert [placed.row["source"] for placed in read_rows([f"{tmp_path}{asked}"])] == read


def test_a_folder_of_several_sets(tmp_path):
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", json.dumps(ROW))
    with pytest.raises(ValueError, match=rf"several sets in one; name one of {tmp_path}/main, {tmp_path}/socratic, or"):
        read_rows([f"{tmp_path}:train"])


def test_a_folder_with_files_that_would_be_left_out(tmp_path):
    write(tmp_path / "train.JSONL", json.dumps(ROW))
    (tmp_path / "test.jsonl.gz").write_bytes(b"")
    assert len(read_rows([f"{tmp_path}:train"])) == 1
    with pytest.raises(ValueError, match=r"test\.jsonl\.gz would be left out"):
        read_rows([tmp_path])


def test_a_row_of_a_data_set_that_cannot_be_read(tmp_path):
    times = pa.array([0, 2**62], pa.timestamp("us"))
    Dataset(pa.table({"question": ["a", "b"], "when": times})).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved: .* cannot be read beyond row 1 \(date value out of range\)"):
        read_rows([tmp_path / "saved"])


def test_a_silent_hub_is_not_waited_for(silent_hub):
    with no_longer_than(20), pytest.raises(ValueError, match=rf"nobody/a:train: .*does not give .*\({silent_hub}: "):
        read_rows(["nobody/a:train"])


def test_what_datasets_saved(tmp_path):
    sets = {split: Dataset.from_list([ROW | {"source": split}]) for split in ("train", "test")}
    DatasetDict(sets).save_to_disk(tmp_path / "both")
    sets["train"].save_to_disk(tmp_path / "one")
    for name, source in (
        (f"{tmp_path}/both:test", "test"),
        (f"{tmp_path}/both/train", "train"),
        (f"{tmp_path}/one", "train"),
    ):
        [placed] = read_rows([name])
        assert (placed.row["source"], placed.place) == (source, f"{name}:1")
        assert len(digest(name)) == 64
    with pytest.raises(ValueError, match=rf"name one of its splits: {tmp_path}/both:train or {tmp_path}/both:test$"):
        read_rows([tmp_path / "both"])
    for name in ("both:dev", "one:test"):
        with pytest.raises(ValueError, match=f"{name}: no such file or folder"):
            read_rows([tmp_path / name])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture
def saved(tmp_path):
    """A data set that was saved in two batches."""
    Dataset.from_list([ROW] * 2000).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "content",
    [None, b"", b"null", b"[1, 2]", b"{", b"\xff", b"[" * 100_000, POINTER],
    ids=lambda content: repr(content)[:12],
)
@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "dataset_dict.json"])
def test_a_saved_data_set_with_a_broken_file(name, content, saved):
    file = saved / name
    if content is None:
        file.unlink(missing_ok=True)
    else:
        file.write_bytes(content)
    if content is None and "dict" in name:
        assert len(read_rows([saved])) == 2000
        return
    with pytest.raises(ValueError, match=str(file)) as error:
        read_rows([saved])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(("state.json", {"_data_files": files}) for files in (None, 3, [], [{}], [{"filename": "other.arrow"}])),
        ("state.json", {"_split": 3}),
        ("state.json", {"_format_type": "nope"}),
        *(("dataset_info.json", {"features": features}) for features in (3, {"other": {"_type": "Value"}}, {"a": 3})),
    ],
    ids=str,
)
def test_a_saved_data_set_that_describes_another(name, changes, saved):
    (saved / name).write_text(json.dumps(json.loads((saved / name).read_text()) | changes))
    with pytest.raises(ValueError, match=str(saved)) as error:
        read_rows([saved])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("splits", [None, 3, [1], {}])
def test_splits_that_are_no_names(splits, tmp_path):
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(ValueError, match=r"dataset_dict\.json: has splits="):
        read_rows([tmp_path])


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.99, "a batch", "a pointer", "missing"])
def test_a_saved_data_set_that_is_cut(share, saved):
    [file] = saved.glob("*.arrow")
    content = file.read_bytes()
    if share == "missing":
        file.unlink()
    elif share == "a batch":  # what ends there can be read
        file.write_bytes(content.removesuffix(b"\xff\xff\xff\xff\0\0\0\0"))
    else:
        file.write_bytes(POINTER if share == "a pointer" else content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="git lfs pull" if share == "a pointer" else str(saved)) as error:
        read_rows([saved])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "folder/a.jsonl"])
def test_a_file_that_git_lfs_has_not_brought(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=f"{tmp_path / name}: a git-lfs pointer.*`git lfs pull`"):
        read_rows([tmp_path / name.split("/")[0]])


def test_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", json.dumps(ROW))
    for name in ("~/folder/train.jsonl", "~/folder", "~/folder:train"):
        assert len(read_rows([name])) == 1
        assert digest(name) == digest(name.replace("~", str(tmp_path)))
        assert len(outline(name)) == 1
    with pytest.raises(ValueError, match="~/nothing: no such file or folder"):
        read_rows(["~/nothing"])


def test_invalid_utf8_is_named_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not JSON"):
        read_rows([tmp_path / "a.jsonl"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "field 'answer' is missing"),
        ({"answer": "<think>b</think>c"}, "field 'question' is missing"),
        ({"question": "a", "answer": ""}, "field 'answer' is empty"),
        ({"question": "a", "answer": 4}, "field 'answer' must be text, not int"),
        ({"question": "a\ud800", "answer": "<think>b</think>4"}, "lone surrogate"),
        (
            {"question": "a", "answer": "4"},
            "does not begin with <think>…</think>; rows without thinking need the fields `prompt`",
        ),
        ({"question": "a", "answer": "</think><think>4"}, "does not begin with <think>…</think>"),
        ({"question": "a", "answer": "so\n#### 4"}, "does not begin with .*data.prepare gsm8k` converts"),
        ({"question": "a", "answer": "4 <think>b</think>"}, "does not begin with <think>…</think>"),
        ({"question": "a", "answer": "<think>b</think> "}, "'answer' has no answer after </think>"),
        ({"prompt": "a", "response": "<think>b 4"}, "field 'response' begins with <think> and has no </think>"),
        (
            {"prompt": "a" * (2**20 + 1), "response": "b"},
            "field 'prompt' has 1,048,577 characters, more than 1,048,576",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>4"}]},
            "message 2 of 'messages' begins with <think> and has no",
        ),
        ({"text": "a"}, "field 'question' is missing.*Its fields are: text$"),
        ({"instruction": "a", "output": "b"}, "field 'question' is missing.*`python -m data.prepare alpaca` converts"),
        ({"conversations": []}, "field 'question' is missing.*`python -m data.prepare sharegpt` converts"),
        ({"prompt": 3, "response": "b"}, "'prompt' must be a non-empty list"),
        ({"prompt": [], "response": "b"}, "'prompt' must be a non-empty list"),
        (
            {"prompt": [{"role": "robot", "content": "a"}], "response": "b"},
            "message 1 of 'prompt' has role 'robot'",
        ),
        (
            {"prompt": [{"role": "user", "content": " "}], "response": "b"},
            "message 1 of 'prompt' is empty",
        ),
        ({"prompt": [{"role": "user"}], "response": "b"}, "message 1 of 'prompt' needs text: field 'content'"),
        ({"prompt": [{"role": "user", "content": "a"}], "response": None}, "field 'response' is null"),
        ({"prompt": None, "response": "b"}, "field 'prompt' is null"),
        ({"response": "b"}, "field 'prompt' is missing"),
        (
            {"messages": [{"role": "user", "content": "a", "images": ["b"]}]},
            "message 1 of 'messages' has images: only text is trained on",
        ),
        ({"messages": [{"from": "human", "value": "a"}]}, "has role None, .*data.prepare sharegpt` converts"),
    ],
)
def test_rows_that_are_no_chat(tmp_path, row, message):
    [placed] = read_rows([write(tmp_path / "a.jsonl", json.dumps(row))])
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: .*{message}"):
        to_chat(placed)


def test_both_schemas_become_chats(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = write(tmp_path / "a.jsonl", json.dumps(ROW), json.dumps({"prompt": messages, "response": "Hello"}))
    s1k, chat = map(to_chat, read_rows([path]))
    assert s1k == {"prompt": [{"role": "user", "content": "2+2?"}], "response": ROW["answer"]}
    assert chat == {"prompt": messages, "response": "Hello"}


def test_a_prompt_needs_no_answer(tmp_path):
    [placed] = read_rows([write(tmp_path / "a.jsonl", json.dumps({"question": "2+2?"}))])
    assert to_prompt(placed) == [{"role": "user", "content": "2+2?"}]


def test_the_final_answer_follows_the_thinking():
    assert final_answer("<think>\n2+2=4\n</think>\n4") == "4"
    assert final_answer("4 ") == "4"
