"""No bit of a finished stage can be flipped unseen."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from compress_search.exceptions import UnreadableStageError
from compress_search.stage_files import fault_of, read_result, seal

RESULT = {"key": "abc", "name": "fine_tune", "accuracy": 0.1 + 0.2, "seconds": 1e-7, "reused": False}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "plan.json").write_text('{"steps": []}')
    (tmp_path / "weights.safetensors").write_bytes(bytes(range(256)))
    seal(tmp_path, RESULT)
    return tmp_path


def test_what_was_sealed_is_read_and_has_no_fault(folder):
    assert read_result(folder) == RESULT
    assert fault_of(folder) is None


@pytest.mark.parametrize("name", ["result.json", "plan.json", "weights.safetensors"])
def test_every_bit_of_every_file_counts(folder, name):
    path = folder / name
    content = path.read_bytes()
    unseen = []
    for position in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        if fault_of(folder) is None:
            unseen.append(position)
    assert unseen == []
    path.write_bytes(content)
    assert fault_of(folder) is None


@pytest.mark.parametrize("name", ["result.json", "plan.json", "weights.safetensors"])
def test_every_shorter_file_is_seen(folder, name):
    content = (folder / name).read_bytes()
    for length in range(len(content)):
        (folder / name).write_bytes(content[:length])
        assert name in fault_of(folder)
    (folder / name).unlink()
    assert "FileNotFoundError" in fault_of(folder)


def test_only_the_files_that_are_asked_for_are_looked_at(folder):
    (folder / "weights.safetensors").unlink()
    assert fault_of(folder, ("plan.json",)) is None
    assert fault_of(folder, ("weights.safetensors",)) is not None


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.ENOMEM, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("name", ["result.json", "plan.json", "weights.safetensors"])
def test_what_cannot_be_read_is_not_taken_for_damaged(folder, monkeypatch, code, name):
    opened = Path.open

    def refused(path, *args, **options):
        if path.name == name:
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UnreadableStageError, match=r"which does not mean that it is damaged.* run the same"):
        fault_of(folder)


def test_without_a_free_descriptor_nothing_is_damaged_and_the_remedy_is_told(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(UnreadableStageError, match=r"Too many open files.*ulimit -n"):
            fault_of(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert fault_of(folder) is None


def test_a_bad_place_of_the_disk_is_a_damage(folder, monkeypatch):
    def bad(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("compress_search.stage_files.file_checksum", bad)
    assert "Input/output error" in fault_of(folder)
