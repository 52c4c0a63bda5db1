"""Weights there and back, through the plain safetensors reader."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compress_search.checkpoint import file_checksum, load_weights, save_weights
from compress_search.exceptions import ModelError, WorkspaceError
from compress_search.fingerprint import model_fingerprint


class Tied(nn.Module):
    """Two layers that share a weight, and a buffer that is a transposed view."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(6.0).reshape(2, 3).T)


def channels_last():
    return nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)


def trained(tiny_net):
    model = tiny_net(seed=1)
    model.train()(torch.randn(8, 1, 6, 6))
    return model


@pytest.mark.parametrize("make", [Tied, channels_last, lambda: nn.Linear(2, 2).bfloat16(), nn.Sequential])
def test_any_state_survives(make, tmp_path):
    model, other = make(), make()
    save_weights(model, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    assert model_fingerprint(other) == model_fingerprint(model)


def test_the_plain_reader_loads_what_was_saved(tiny_net, tmp_path):
    model, other = trained(tiny_net), tiny_net()
    save_weights(model, tmp_path / "new" / "weights.safetensors")
    other.load_state_dict(load_file(tmp_path / "new" / "weights.safetensors"))
    assert model_fingerprint(other) == model_fingerprint(model)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["weights.safetensors"]


def test_equal_models_make_equal_files(tiny_net, tmp_path):
    for name in ("a", "b"):
        save_weights(tiny_net(), tmp_path / name)
    assert file_checksum(tmp_path / "a") == file_checksum(tmp_path / "b")


def test_the_checksum_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"weights" * 1000)
    assert file_checksum(tmp_path / "file") == hashlib.sha256(b"weights" * 1000).hexdigest()


def test_a_state_that_is_not_tensors_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

    with pytest.raises(ModelError, match="state of Extra holds '_extra_state', a dict"):
        save_weights(Extra(2, 2), tmp_path / "weights")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_missing_or_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WorkspaceError, match=r"weights\.safetensors' cannot be read"):
        load_weights(nn.Linear(2, 2), path)


def test_weights_of_another_architecture_are_refused(tiny_net, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(tiny_net(width=4), path)
    with pytest.raises(ModelError, match="do not fit Sequential.*size mismatch"):
        load_weights(tiny_net(width=5), path)
