"""Layers that are more than weight and bias: counted, left alone with a reason, and never in the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm

from compress_search import Compress, compress
from compress_search.calibration import divergence
from compress_search.methods import METHODS
from compress_search.profile import profile_model


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation, as in BiT."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class PaddingConv2d(nn.Conv2d):
    """Pads by itself, as timm's Conv2dSame does."""

    def forward(self, x):
        return super().forward(functional.pad(x, (0, 1, 0, 1)))


class OverridingConv2d(nn.Conv2d):
    """Overrides what convolutions leave to their subclasses."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


def _conv_with_norm_inside():
    class Conv2d(nn.Conv2d):
        """Of the same name as PyTorch's, as in detectron2."""

        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.norm = nn.BatchNorm2d(self.out_channels)

        def forward(self, x):
            return functional.relu(self.norm(super().forward(x)))

    return Conv2d(8, 8, 3, padding=1)


def _patched():
    layer = nn.Conv2d(8, 8, 3, padding=1)
    layer.forward = lambda x: 2 * nn.Conv2d.forward(layer, x)
    return layer


def _masked(name):
    return prune.l1_unstructured(nn.Conv2d(8, 8, 3, padding=1), name, amount=0.3)


OWN_FORWARD = {
    "weight standardisation": lambda: StandardisedConv2d(8, 8, 3, padding=1),
    "padding": lambda: PaddingConv2d(8, 8, 3, stride=2),
    "own _conv_forward": lambda: OverridingConv2d(8, 8, 3, padding=1),
    "norm inside": _conv_with_norm_inside,
    "patched": _patched,
}
COMPUTED = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "old spectral norm": lambda: spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "masked weight": lambda: _masked("weight"),
    "masked bias": lambda: _masked("bias"),
}
every_method = pytest.mark.parametrize("method", METHODS)


class Net(nn.Module):
    """Plain layers before and after an odd one."""

    def __init__(self, odd):
        super().__init__()
        self.before, self.odd = nn.Conv2d(3, 8, 3, padding=1), odd
        self.after, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        x = functional.relu(self.odd(functional.relu(self.before(x))))
        return self.head(functional.relu(self.after(x)).mean((2, 3)))


def _net(odd):
    torch.manual_seed(0)
    model = Net(odd()).train()
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    return model.eval()


@every_method
@pytest.mark.parametrize("kind", OWN_FORWARD | COMPUTED)
def test_an_odd_layer_is_left_alone_and_the_others_are_not(method, kind):
    model, batches = _net((OWN_FORWARD | COMPUTED)[kind]), list(torch.randn(5, 16, 3, 8, 8))
    analysis = METHODS[method].analyse(model, batches[0])
    why = "with a forward of its own" if kind in OWN_FORWARD else "is computed from other parameters"
    assert why in analysis.left_alone["odd"] and type(model.odd).__name__ in analysis.left_alone["odd"]
    assert "after" in {unit.name for unit in analysis.units}
    assert analysis.profile.layer("odd").macs > 0

    full = analysis.apply({unit.name: unit.full_size for unit in analysis.units}, batches)
    assert divergence(full.model, model, batches) < 1e-9
    compressed = compress(model, batches[0], batches, Compress(method=method, mac_ratio=0.85))
    counted = profile_model(compressed.model, batches[0])
    assert compressed.step.mac_ratio == counted.macs / analysis.profile.macs <= 0.85
    assert "odd" not in {edit.layer for edit in compressed.step.edits}
    for name, value in model.odd.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(compressed.model.odd.state_dict()[name], value)


@every_method
def test_a_linear_layer_that_adds_something_is_left_alone(method):
    class Linear(nn.Linear):
        """As loralib's."""

        def __init__(self, *args):
            super().__init__(*args)
            self.down = nn.Parameter(torch.randn(2, self.in_features))
            self.up = nn.Parameter(torch.randn(self.out_features, 2))

        def forward(self, x):
            return super().forward(x) + x @ self.down.T @ self.up.T

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    analysis = METHODS[method].analyse(model, torch.zeros(1, 16))
    assert "a Linear with a forward of its own" in analysis.left_alone["2"]
    assert "2" not in {unit.name for unit in analysis.units}


@every_method
def test_a_subclass_that_changes_nothing_is_compressed(method):
    class Initialised(nn.Conv2d):
        def reset_parameters(self):
            nn.init.normal_(self.weight)
            nn.init.zeros_(self.bias)

    model, batches = _net(lambda: Initialised(8, 8, 3, padding=1)), list(torch.randn(5, 16, 3, 8, 8))
    analysis = METHODS[method].analyse(model, batches[0])
    assert "odd" in {unit.name for unit in analysis.units}
    compressed = analysis.apply({"odd": 2}, batches)
    assert profile_model(compressed.model, batches[0]).macs == analysis.predict_macs({"odd": 2})


@every_method
def test_pruning_into_an_odd_layer_leaves_what_feeds_it(method):
    analysis = METHODS[method].analyse(_net(_conv_with_norm_inside), torch.zeros(1, 3, 8, 8))
    is_sized = "before" in {unit.name for unit in analysis.units}
    assert is_sized == (method != "channel_pruning")
    if not is_sized:
        wanted = "its channels meet a Conv2d with a forward of its own (odd)"
        assert analysis.left_alone["before"] == wanted


class Residual(nn.Module):
    """A block, and a layer that is run twice, which are given their inputs by position or by name."""

    def __init__(self, *, by_name):
        super().__init__()
        self.by_name = by_name
        self.stem, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.other = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def _run(self, layer, x):
        return layer(input=x) if self.by_name else layer(x)

    def forward(self, x):
        x = functional.relu(self._run(self.stem, x))
        x = functional.relu(x + self._run(self.norm, self._run(self.one, x)))
        for _ in range(2):
            x = functional.relu(self._run(self.other, x))
        return self._run(self.head, x.mean((2, 3)))


@every_method
@pytest.mark.parametrize("samples", [0, 64])
def test_layers_given_their_input_by_name_are_compressed_like_any_other(method, samples):
    batches = list(torch.randn(4, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    models = []
    for by_name in (False, True):
        torch.manual_seed(0)
        model = Residual(by_name=by_name).eval()
        stage = Compress(method=method, mac_ratio=0.6)
        models.append(compress(model, batches[0], batches if samples else [], stage).model)
    for value, wanted in zip(models[1].state_dict().values(), models[0].state_dict().values(), strict=True):
        assert torch.equal(value, wanted)


class OneByOne(nn.Module):
    """Runs two of its convolutions on one example at a time, without a batch axis."""

    def __init__(self):
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.other, self.tail = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        x = torch.stack([functional.relu(self.other(functional.relu(self.one(image)))) for image in x])
        return self.head(functional.relu(self.tail(x)).mean((2, 3)))


@every_method
@pytest.mark.parametrize("samples", [0, 48])
def test_a_convolution_without_a_batch_axis_is_left_alone(method, samples):
    torch.manual_seed(0)
    model = OneByOne().eval()
    batches = list(torch.randn(3, 16, 3, 8, 8)) if samples else []
    analysis = METHODS[method].analyse(model, torch.zeros(1, 3, 8, 8))
    assert analysis.profile.layer("one").macs == 8 * 8 * 9 * 64
    wanted = "its channels go to other, which is" if method == "channel_pruning" else "it is"
    assert analysis.left_alone["one"] == f"{wanted} given inputs without a batch axis"
    names = {unit.name for unit in analysis.units}
    assert "tail" in names and "one" not in names
    full = analysis.apply({unit.name: unit.full_size for unit in analysis.units}, batches)
    inputs = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(full.model(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    stage = Compress(method=method, mac_ratio=0.85)
    compressed = compress(model, torch.zeros(1, 3, 8, 8), batches, stage)
    counted = profile_model(compressed.model, inputs)
    assert compressed.step.mac_ratio == counted.macs / analysis.profile.macs <= 0.85
