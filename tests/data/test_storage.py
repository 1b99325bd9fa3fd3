"""Files are whole or absent, and errors name broken ones."""

import errno
import io
import os
import resource
import shutil
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.storage import (
    AppendedRecords,
    DigestedFile,
    digest_bytes,
    digest_file,
    find_full_disk,
    read_object,
    read_records,
    refuse_links,
    whole_directory,
    whole_file,
    writing,
)


@contextmanager
def files_up_to(size: int):
    """A limit on the size of files, which stands in for a full disk. pytest captures what is printed in a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path):
    file = tmp_path / "a.json"
    for text in ("one", "two"):
        with whole_file(file) as written:
            written.write(text)
            assert not file.exists() or file.read_text() == "one"
        assert file.read_text() == text
    with pytest.raises(AttributeError), whole_file(file) as written:
        written.no_such_method()
    message = r"a\.json could not be written: the disk is full"
    with files_up_to(10), pytest.raises(OSError, match=message), whole_file(file) as written:
        written.write("three" * 10_000)
    assert (file.read_text(), names(tmp_path)) == ("two", ["a.json"])


def test_a_directory_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "hf"
    for text in ("one", "two"):
        with whole_directory(target, replace=True) as unfinished:
            (unfinished / "model").write_text(text)
        assert (target / "model").read_text() == text
    message = "hf could not be written: the disk is full"
    with files_up_to(10), pytest.raises(OSError, match=message), whole_directory(target, replace=True) as unfinished:
        (unfinished / "model").write_text("three" * 10_000)
    assert ((target / "model").read_text(), names(tmp_path)) == ("two", ["hf"])
    with pytest.raises(ValueError, match=r"hf exists: delete it"), whole_directory(target):
        pass
    shutil.rmtree(target)
    target.mkdir()
    with whole_directory(target) as unfinished:
        (unfinished / "model").touch()
    assert names(target) == ["model"]


def fill(path: Path, how: str) -> None:
    match how:
        case "python":
            path.write_bytes(b"x" * 10**6)
        case "torch":
            with DigestedFile(path) as file:
                try:
                    torch.save(torch.ones(10**6), file)
                except RuntimeError as error:  # which does not say why
                    raise file.failure from error
        case "safetensors":
            save_file({"a": torch.ones(10**6)}, path)


@pytest.mark.parametrize("how", ["python", "torch", "safetensors"])
def test_a_full_disk_is_called_one_whoever_writes(tmp_path, how):
    message = "model could not be written: the disk is full"
    with files_up_to(1000), pytest.raises(OSError, match=message), writing(tmp_path / "model"):
        fill(tmp_path / "model", how)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_is_a_full_disk(number):
    error = OSError(number, os.strerror(number))
    assert "the disk is full" in find_full_disk(error)
    wrapped = RuntimeError("no reason")
    wrapped.__cause__ = error
    assert find_full_disk(wrapped) == find_full_disk(error)
    assert find_full_disk(RuntimeError(f"rank 1: {os.strerror(number)} (os error {number})"))
    assert find_full_disk(OSError(errno.EACCES, "Permission denied")) is None


def test_a_real_full_device():
    with pytest.raises(OSError, match="the disk is full"), writing("/dev/full"), open("/dev/full", "w") as file:
        file.write("x")


def test_digests_are_of_the_content(tmp_path):
    content = os.urandom(300_000)
    with DigestedFile(tmp_path / "a") as file:
        for start in range(0, len(content), 70_001):
            file.write(memoryview(content)[start : start + 70_001])
    assert file.hexdigest() == digest_file(tmp_path / "a") == digest_bytes(content)


@pytest.mark.parametrize("torn", [b"", b'{"step"', b'{"step": 3}', b"\0" * 512, b'{"st\0\0\0', b"\xff\xfe"], ids=repr)
def test_a_torn_end_is_dropped_with_a_word(tmp_path, capsys, torn):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n\n{"step": 2}\n' + torn)
    assert read_records(file) == ([{"step": 1}, {"step": 2}], [12, 25])
    note = f"{file}: its torn end of {len(torn)} bytes is dropped\n" if torn else ""
    assert capsys.readouterr().err == note


@pytest.mark.parametrize(
    "line", [b"[1, 2]", b"null", b"{", b"\xff", b"\0\0", b"[" * 100_000, b"3"], ids=lambda b: repr(b[:9])
)
def test_another_broken_line_is_named(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not (JSON|a JSON object)") as error:
        read_records(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [None, b"", b"null", b"[1,2]", b"{", b"\xff", b"[" * 100_000], ids=lambda b: repr(b and b[:9])
)
def test_a_file_that_is_no_object_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json (cannot be read as JSON|is not a JSON object)"):
        read_object(tmp_path / "run.json")


def test_links_and_devices_are_refused(tmp_path):
    plain, link, dangling, pipe = (tmp_path / name for name in ("plain", "link", "dangling", "pipe"))
    plain.touch()
    link.symlink_to(plain)
    dangling.symlink_to(tmp_path / "nowhere")
    os.mkfifo(pipe)
    refuse_links(plain, tmp_path, tmp_path / "absent")
    for path in (link, dangling):
        with pytest.raises(ValueError, match=f"{path.name} is a symbolic link to"):
            refuse_links(plain, path)
    with pytest.raises(ValueError, match="pipe is neither a file nor a directory"):
        refuse_links(pipe)


def test_nothing_is_written_through_a_link(tmp_path):
    """Paths of unfinished files and directories, and of appended files."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "a.json.unfinished").symlink_to(precious)
    with whole_file(tmp_path / "a.json") as file:
        file.write("mine")
    assert not (tmp_path / "a.json").is_symlink()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "p").touch()
    (tmp_path / "hf.unfinished").symlink_to(tmp_path / "kept")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf.replaced").symlink_to(tmp_path / "kept")
    with whole_directory(tmp_path / "hf", replace=True) as unfinished:
        (unfinished / "model").touch()
    assert (names(tmp_path / "hf"), names(tmp_path / "kept")) == (["model"], ["p"])
    (tmp_path / "lines.jsonl").symlink_to(precious)
    with pytest.raises(ValueError, match=r"lines\.jsonl is a symbolic link"):
        AppendedRecords(tmp_path / "lines.jsonl")
    assert precious.read_text() == "precious"


def test_an_error_of_another_file_stays_what_it_is(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"No such file or directory: .*source"),
        whole_file(tmp_path / "a") as file,
    ):
        file.write((tmp_path / "source").read_text())
    assert names(tmp_path) == []
