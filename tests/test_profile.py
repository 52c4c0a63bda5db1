"""MACs against their closed forms and against PyTorch's own flop counter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from compress_search.exceptions import ModelError
from compress_search.fingerprint import model_fingerprint
from compress_search.profile import inference_mode_of, layer_macs, profile_model, training_paths_of


def macs_of(layer, *shape):
    return profile_model(nn.Sequential(layer), torch.randn(shape)).macs


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        # out channels x in channels / groups x kernel x output positions
        (nn.Conv2d(3, 8, 3), (1, 3, 10, 10), 8 * 3 * 9 * 8 * 8),
        (nn.Conv2d(3, 8, 3, padding=1, stride=2), (1, 3, 10, 10), 8 * 3 * 9 * 5 * 5),
        (nn.Conv2d(3, 8, 3, dilation=2), (1, 3, 10, 10), 8 * 3 * 9 * 6 * 6),
        (nn.Conv2d(3, 8, (1, 5), padding=(0, 2), stride=(2, 1)), (1, 3, 9, 10), 8 * 3 * 5 * 5 * 10),
        (nn.Conv2d(6, 8, 3, groups=2), (1, 6, 5, 5), 8 * 3 * 9 * 3 * 3),
        (nn.Conv2d(6, 6, 3, groups=6, padding=1), (1, 6, 5, 5), 6 * 1 * 9 * 5 * 5),
        (nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"), (1, 3, 7, 7), 8 * 3 * 9 * 7 * 7),
        (nn.Conv1d(4, 6, 3), (1, 4, 10), 6 * 4 * 3 * 8),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6), 3 * 2 * 8 * 3 * 4 * 5),
        # a transposed convolution spreads every input position over the kernel
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 7), 4 * 6 * 9 * 5 * 7),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (1, 4, 5, 5), 4 * 3 * 9 * 5 * 5),
        (nn.ConvTranspose1d(4, 6, 3), (1, 4, 5), 4 * 6 * 3 * 5),
        (nn.Linear(7, 5), (1, 7), 7 * 5),
        (nn.Linear(7, 5), (1, 11, 7), 7 * 5 * 11),
        (nn.Linear(7, 5), (1, 2, 11, 7), 7 * 5 * 2 * 11),
    ],
)
def test_macs_are_the_closed_form(layer, shape, macs):
    assert macs_of(layer, *shape) == macs


def test_macs_do_not_depend_on_the_bias_and_are_for_one_example():
    assert macs_of(nn.Conv2d(3, 8, 3, bias=False), 1, 3, 10, 10) == macs_of(nn.Conv2d(3, 8, 3), 5, 3, 10, 10)


@settings(deadline=None, max_examples=40)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    transposed=st.booleans(),
)
def test_macs_are_half_of_the_flop_counters_flops(kernel, stride, padding, dilation, groups, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(4, 8, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    inputs = torch.randn(1, 4, 11, 13)
    with FlopCounterMode(display=False) as counter:
        layer(inputs)
    assert macs_of(layer, 1, 4, 11, 13) * 2 == counter.get_total_flops()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.shortcut = nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((self.down(x) + self.shortcut(x)).mean(dim=(2, 3)))


def test_a_network_is_profiled_layer_by_layer():
    model, inputs = Residual(), torch.randn(4, 3, 8, 8)
    profile = profile_model(model, inputs)
    with FlopCounterMode(display=False) as counter:
        model(inputs[:1])
    assert profile.macs * 2 == counter.get_total_flops()
    assert [layer.name for layer in profile.layers] == ["stem", "down", "shortcut", "head"]
    assert profile.uncounted == ()
    down = profile.layer("down")
    assert (down.kind, down.weight_shape) == ("Conv2d", (12, 8, 3, 3))
    assert down.calls == (((1, 8, 8, 8), (1, 12, 4, 4)),)
    assert (down.macs, down.params) == (12 * 8 * 9 * 16, 12 * 8 * 9)
    assert profile.params == sum(p.numel() for p in model.parameters())


def test_the_ratio_is_to_the_reference():
    small = profile_model(nn.Conv2d(2, 4, 1), torch.randn(1, 2, 3, 3))
    large = profile_model(nn.Conv2d(2, 16, 1), torch.randn(1, 2, 3, 3))
    assert small.mac_ratio(large) == 0.25


def test_a_layer_that_did_not_run_is_idle():
    model = Residual()
    assert profile_model(model, torch.randn(1, 3, 8, 8)).idle == ()
    model.spare = nn.Linear(2, 2)
    profile = profile_model(model, torch.randn(1, 3, 8, 8))
    with pytest.raises(KeyError, match="spare"):
        profile.layer("spare")
    (idle,) = profile.idle
    assert (idle.name, idle.kind, idle.calls, idle.macs, idle.params) == ("spare", "Linear", (), 0, 6)


def test_the_paths_of_training_are_taken_without_training():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()), nn.Linear(2, 2)).eval()
    model[1].train()

    def fail():
        with training_paths_of(model):
            assert model.training and model[0].training
            assert not any(m.training for m in (model[0][0], model[0][1], model[1]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [m.training for m in model.modules()] == [False, False, False, False, True]


def test_a_module_used_twice_costs_its_macs_twice_and_its_parameters_once():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    profile = profile_model(nn.Sequential(layer, nn.MaxPool2d(2), layer), torch.randn(1, 4, 8, 8))
    (only,) = profile.layers
    assert only.calls == (((1, 4, 8, 8), (1, 4, 8, 8)), ((1, 4, 4, 4), (1, 4, 4, 4)))
    assert only.macs == 4 * 4 * 9 * (64 + 16)
    assert only.params == profile.params == 4 * 4 * 9 + 4


class ByName(nn.Module):
    """Gives layers their inputs by name; one of them also returns a pair."""

    class Pair(nn.Linear):
        def forward(self, hidden, scale=1.0):
            return super().forward(hidden) * scale, self.bias

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.pair = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2), self.Pair(2, 6)

    def forward(self, x):
        x = self.up(output_size=(5, 5), input=self.conv(input=x))
        return self.pair(hidden=x.mean((2, 3)))[0]


def test_layers_may_be_given_their_inputs_by_name():
    profile = profile_model(ByName(), torch.randn(2, 3, 6, 6))
    assert profile.layer("conv").calls == (((1, 3, 6, 6), (1, 4, 4, 4)),)
    assert profile.layer("up").calls == (((1, 4, 4, 4), (1, 2, 5, 5)),)
    assert profile.layer("pair").calls == (((1, 2), (1, 6)),)
    assert [layer.macs for layer in profile.layers] == [4 * 3 * 9 * 16, 4 * 2 * 4 * 16, 2 * 6]


def test_layer_macs_counts_the_batch_it_is_given():
    assert layer_macs(nn.Linear(3, 2), (5, 3), (5, 2)) == 5 * 6


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.kernel = nn.Parameter(torch.randn(2, 1, 3, 3))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = functional.conv2d(self.first(x), self.kernel).flatten(2)
        x, _ = self.attention(x, x, x)
        return x @ x.transpose(1, 2)


def test_operations_that_multiply_outside_a_counted_layer_are_named():
    with pytest.warns(UserWarning, match=r"not counted in the MACs.*the model itself \(aten\.convolution\)"):
        profile = profile_model(Functional(), torch.randn(1, 1, 4, 4), warn=True)
    assert [layer.name for layer in profile.layers] == ["first"]
    assert {"the model itself (aten.convolution)", "the model itself (aten.bmm)"} <= set(profile.uncounted)
    assert any(name.startswith("attention (") for name in profile.uncounted)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_model_is_left_as_it_was():
    model = Residual().train()
    model.norm.eval()
    before = model_fingerprint(model)
    profile_model(model, torch.randn(2, 3, 8, 8), warn=True)
    assert model.training
    assert not model.norm.training
    assert model_fingerprint(model) == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_fails_is_left_as_it_was_too():
    model = Residual().train()
    with pytest.raises(ModelError, match=r"shape \(1, 4, 8, 8\).*example_input"):
        profile_model(model, torch.randn(1, 4, 8, 8))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_without_layers_to_compress_is_refused():
    with pytest.raises(ModelError, match="Sequential ran no convolution or linear layer"):
        profile_model(nn.Sequential(nn.ReLU()), torch.randn(1, 3))


def test_inference_mode_restores_each_modules_mode_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
    model[1].eval()

    def fail():
        with inference_mode_of(model):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [m.training for m in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()


def test_a_notebook_shows_the_layers():
    profile = profile_model(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)), torch.zeros(1, 3, 3, 3)
    )
    page = profile._repr_html_()
    assert "232 MACs for one example, 242 parameters" in page
    assert all(text in page for text in ("8 × 3 × 3 × 3", ">216<", "2 × 8", ">16<"))
