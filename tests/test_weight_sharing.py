"""Copies that share weights: what is shared, and what nobody notices."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune

from compress_search.weight_sharing import copy_sharing_weights


class Tied(nn.Module):
    """Two layers of one weight, a frozen one, and a buffer."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.other.weight = self.one.weight
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.frozen(self.norm(self.other(torch.relu(self.one(x)))))


def test_a_copy_shares_its_parameters_memory_until_they_part():
    model = Tied()
    copied, part = copy_sharing_weights(model)
    pairs = list(zip(model.named_parameters(), copied.named_parameters(), strict=True))
    for (name, own), (other_name, other) in pairs:
        assert name == other_name and own is not other
        assert own.data_ptr() == other.data_ptr() and own.requires_grad == other.requires_grad
    assert copied.other.weight is copied.one.weight
    assert copied.norm.running_mean.data_ptr() != model.norm.running_mean.data_ptr()
    part()
    for (_, own), (_, other) in pairs:
        assert own.data_ptr() != other.data_ptr()
        assert torch.equal(own, other)
    assert copied.other.weight is copied.one.weight
    inputs = torch.randn(3, 4)
    torch.testing.assert_close(copied(inputs), model(inputs), rtol=0, atol=0)


def test_what_the_copy_has_replaced_is_left_as_it_is_when_they_part():
    copied, part = copy_sharing_weights(Tied())
    copied.frozen = nn.Linear(4, 3)
    own = copied.frozen.weight.data_ptr()
    part()
    assert copied.frozen.weight.data_ptr() == own


def test_what_a_layer_computed_with_gradients_does_not_keep_it_from_being_copied():
    layer = prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)
    inputs = torch.randn(2, 4)
    wanted = layer(inputs)
    assert not layer.weight.is_leaf
    copied, _ = copy_sharing_weights(layer)
    assert torch.equal(copied(inputs), wanted)
