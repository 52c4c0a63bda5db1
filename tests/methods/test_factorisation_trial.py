"""Networks that do without some of their layers, and networks that do not."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from compress_search import Compress, compress
from compress_search.methods import METHODS
from compress_search.methods.factorisation_trial import faults_of_factorising
from compress_search.plan import FactoriseLayer, Part
from compress_search.profile import profile_model

EXAMPLE = torch.zeros(1, 3, 12, 12)


def _analysis(model, method="weight_svd"):
    return METHODS[method].analyse(model.eval(), EXAMPLE)


class Plain(nn.Module):
    """Convolutions and a head; how they are used is up to those who inherit."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.head = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.up(torch.relu(self.b(torch.relu(self.a(x)))))).mean((2, 3)))


class InAList(Plain):
    """Holds on to two layers in a list that PyTorch does not know of."""

    def __init__(self):
        super().__init__()
        self.layers = [self.a, self.b]

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


class ReadsAWeight(Plain):
    """Asks a layer for its precision, as CLIP does."""

    def forward(self, x):
        return super().forward(x.to(self.a.weight.dtype))


class GivesASize(Plain):
    """Tells the transposed convolution how large its output should be."""

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.head(self.up(x, output_size=(24, 24)).mean((2, 3)))


class LooksAtTypes(Plain):
    """Runs a layer if it is a convolution."""

    def forward(self, x):
        x = torch.relu(self.a(x))
        if isinstance(self.b, nn.Conv2d):
            x = torch.relu(self.b(x))
        return self.head(self.up(x).mean((2, 3)))


class Transformer(nn.Module):
    """PyTorch's encoder layer reads the weights of its linear layers, but only without gradients or hooks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(16, 5)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        return self.head(self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


GOES_ON = "the network goes on using it where it is replaced"
PASSES_OVER = "the network passes over what replaces it"
NO_WEIGHT = "the network fails without it (AttributeError: 'Sequential' object has no attribute 'weight')"
NO_SIZE = (
    "the network fails without it (TypeError: Sequential.forward() got an unexpected keyword argument "
    "'output_size')"
)


@pytest.mark.parametrize(
    ("net", "faults"),
    [
        (Plain, {}),
        (InAList, {"a": GOES_ON, "b": GOES_ON}),
        (ReadsAWeight, {"a": NO_WEIGHT}),
        (GivesASize, {"up": NO_SIZE}),
        (LooksAtTypes, {"b": PASSES_OVER}),
        (Transformer, {"encoder.linear1": NO_WEIGHT, "encoder.linear2": NO_WEIGHT}),
    ],
)
def test_layers_that_a_network_cannot_do_without_are_left_alone(net, faults):
    model = net().eval()
    analysis = _analysis(model)
    idle = {layer.name for layer in analysis.profile.idle}
    assert {name: reason for name, reason in analysis.left_alone.items() if name not in idle} == faults
    batches = list(torch.randn(4, 8, 3, 12, 12))
    compressed = compress(
        model, EXAMPLE, batches, Compress(method="weight_svd", mac_ratio=0.93, selection="uniform")
    )
    with torch.no_grad():
        assert compressed.model(EXAMPLE).shape == model(EXAMPLE).shape
    assert compressed.step.mac_ratio == profile_model(compressed.model, EXAMPLE).mac_ratio(analysis.profile)
    # What is compressed a layer at a time sees the same units, and the same reasons.
    after = analysis.after(compressed, EXAMPLE)
    assert after.faults == faults


class Counting(Plain):
    """Counts the passes of all its copies."""

    passes: ClassVar[list[int]] = []

    def forward(self, x):
        self.passes.append(len(x))
        return super().forward(x)


@pytest.mark.parametrize("method", ["spatial_svd", "weight_svd"])
def test_a_sound_network_is_tried_in_one_pass_of_one_example(method):
    model = Counting().eval()
    example = torch.zeros(4, 3, 12, 12)
    profile_model(model, example)
    before = len(Counting.passes)
    METHODS[method].analyse(model, example)
    # One pass to profile the model, and one to try it.
    assert Counting.passes[before:] == [1, 1]


def test_no_random_numbers_are_drawn_and_the_model_is_as_it_was():
    model = Plain().train()
    model.b.weight.requires_grad_(False)
    before, state = torch.get_rng_state(), {n: t.clone() for n, t in model.state_dict().items()}
    METHODS["weight_svd"].analyse(model, EXAMPLE)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training and type(model.b) is nn.Conv2d and "forward" not in vars(model.b)


class GoesByValues(Plain):
    """Goes on until the values tell it to stop, which with other weights they may never do."""

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x))))
        if not torch.allclose(x.sum(), x.sum() * 0 + self.wanted, rtol=1e-4):
            raise FloatingPointError("this is not what the weights make of it")
        return self.head(self.up(x).mean((2, 3)))


def test_a_network_that_goes_by_values_sees_those_of_its_own_layers():
    model = GoesByValues().eval()
    with torch.no_grad():
        model.wanted = float(torch.relu(model.b(torch.relu(model.a(EXAMPLE)))).sum())
    assert _analysis(model).left_alone == {}


def test_parts_that_give_another_shape_are_a_fault():
    parts = (
        Part("one", "Conv2d", {"in_channels": 8, "out_channels": 1, "kernel_size": 1}),
        Part("other", "Conv2d", {"in_channels": 1, "out_channels": 8, "kernel_size": 3}),
    )
    faults = faults_of_factorising(Plain().eval(), EXAMPLE, [FactoriseLayer("b", 1, parts)])
    wanted = "(RuntimeError: its parts give (1, 8, 10, 10) in place of (1, 8, 12, 12))"
    assert faults == {"b": f"the network fails without it {wanted}"}
    assert faults_of_factorising(Plain().eval(), EXAMPLE, []) == {}


def test_a_layer_that_is_left_alone_is_refitted_all_the_same():
    model, batches = ReadsAWeight().eval(), list(torch.randn(5, 8, 3, 12, 12))
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), model).eval()
    factorised = METHODS["weight_svd"].analyse(model, batches[0]).apply({"0": 2}, batches).model
    assert isinstance(factorised[1].a, nn.Conv2d)
    assert not torch.equal(factorised[1].a.weight, model[1].a.weight)
