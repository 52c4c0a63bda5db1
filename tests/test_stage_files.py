"""No bit of a finished stage can be flipped unseen."""

from __future__ import annotations

import pytest

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
