"""Replay: a rerun gives exactly what a whole run with the same parameters gives."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from compress_search.profile import COUNTED_LAYERS, inference_mode_of
from compress_search.replay import Prefix, Prefixes

_spec = importlib.util.spec_from_file_location("zoo", Path(__file__).parent / "methods" / "zoo.py")
zoo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(zoo)


class InPlace(nn.Module):
    """Changes tensors in place between modules, and calls one module twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        x = self.norm(self.stem(images))
        y = self.one(x)
        x += 0.5
        y = self.act(y) + self.one(self.act(x))
        y += x
        return self.head(functional.adaptive_avg_pool2d(self.two(y).relu_(), 1).flatten(1))


def counted(model):
    return [name for name, module in model.named_modules() if isinstance(module, COUNTED_LAYERS)]


def whole_run(model, images, parameters):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in parameters.items():
            changed.get_parameter(name).copy_(value)
    with inference_mode_of(changed):
        return changed(images)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True))


@pytest.mark.parametrize("name", ["in_place", *zoo.ZOO])
def test_a_rerun_is_a_whole_run_to_the_bit(name):
    torch.manual_seed(0)
    model = InPlace().eval() if name == "in_place" else zoo.build(name)
    images = torch.randn(2, *zoo.EXAMPLE_SHAPE[1:])
    for name in counted(model):
        prefix = Prefix(model, images, [name])
        weight = model.get_submodule(name).weight
        for factor in (1.0, 0.5):
            parameters = {f"{name}.weight": (factor * weight).detach()}
            assert same(prefix.rerun(parameters), whole_run(model, images, parameters))


@pytest.mark.parametrize("name", ["in_place", *zoo.ZOO])
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_a_prefix_that_went_on_is_one_that_started_anew(name, order):
    torch.manual_seed(0)
    model = InPlace().eval() if name == "in_place" else zoo.build(name)
    images = torch.randn(2, *zoo.EXAMPLE_SHAPE[1:])
    layers = counted(model)[:: 1 if order == "forward" else -1]
    prefix = Prefix(model, images, layers[:1])
    for name in layers:
        prefix.move_to([name])
        parameters = {f"{name}.weight": torch.randn_like(model.get_submodule(name).weight)}
        assert same(prefix.rerun(parameters), whole_run(model, images, parameters))


def counting(model):
    """Note down the name of each module without children whose own ``forward`` runs."""
    runs = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            forward = module.forward
            module.forward = lambda *args, name=name, forward=forward: runs.append(name) or forward(*args)
    return runs


def test_all_prefixes_of_a_batch_together_take_one_forward_pass():
    torch.manual_seed(0)
    block = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), *(copy.deepcopy(nn.Sequential(*block)) for _ in range(4))
    ).eval()
    layers, runs = counted(model), counting(model)
    prefix = Prefix(model, torch.randn(1, 3, 8, 8), layers[:1])
    held = []
    for name in layers[1:]:
        prefix.move_to([name])
        held.append(prefix.held_bytes)
    leaves = [name for name, module in model.named_modules() if next(module.children(), None) is None]
    assert runs == leaves[: leaves.index(layers[-1])]
    # In a chain, what the next part is given is all that is kept, however far the run is.
    assert held == [8 * 64 * 4] * 4


@pytest.mark.parametrize("bound", [2**29, 3000, 0])
def test_prefixes_that_do_not_fit_into_memory_start_anew(bound, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(5))).eval()
    batches = list(torch.randn(4, 3, 8, 8).split(2))  # Each prefix holds 2 * 3 * 64 * 4 = 1536 bytes.
    monkeypatch.setattr("compress_search.replay._KEPT_BYTES", bound)
    prefixes = Prefixes(model, batches, list("01234"))
    list(prefixes.before("0"))
    usual, runs = copy.deepcopy(model), counting(model)
    for name in "1234":
        for prefix, batch in zip(prefixes.before(name), batches, strict=True):
            parameters = {f"{name}.weight": torch.randn(3, 3, 1, 1)}
            before = len(runs)
            assert same(prefix.rerun(parameters), whole_run(usual, batch, parameters))
            del runs[before:]
    anew, going_on = 1 + 2 + 3 + 4, 4
    assert len(runs) == {2**29: 2 * going_on, 3000: going_on + anew, 0: 2 * anew}[bound]


class Leaving(nn.Conv2d):
    """Leaves its output in itself, for others to find."""

    def forward(self, images):
        self.left = super().forward(images)
        return self.left


class Finding(nn.Module):
    """Finds what another module has left there."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = Leaving(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, images):
        return self.three(self.two(self.one(images)) + self.one.left)


class Viewing(nn.Module):
    """Changes its input by way of a view that a module gives."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(256, 5)
        self.inner = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(256, 256))

    def forward(self, images):
        x = self.stem(images)
        y = self.inner(x)
        return self.head(x.flatten(1) + y)


class Alternating(nn.Module):
    """Takes another way every time."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.times = 0

    def forward(self, images):
        self.times += 1
        first = self.one if self.times % 2 else self.two
        return self.three(first(images))


def test_batches_that_do_not_keep_apart_start_anew():
    torch.manual_seed(0)
    model, batches = Finding().eval(), list(torch.randn(4, 3, 8, 8).split(2))
    prefixes = Prefixes(model, batches, ["one", "two", "three"])
    for name in ("one", "two", "three"):
        for prefix, batch in zip(prefixes.before([name]), batches, strict=True):
            parameters = {f"{name}.weight": torch.randn(3, 3, 1, 1)}
            assert same(prefix.rerun(parameters), whole_run(model, batch, parameters))


def test_a_prefix_does_not_go_on_from_views():
    torch.manual_seed(0)
    model, images = Viewing().eval(), torch.randn(2, 3, 8, 8)
    prefix = Prefix(model, images, ["inner.2"])
    prefix.move_to(["head"])
    parameters = {"head.weight": torch.randn(5, 256)}
    assert same(prefix.rerun(parameters), whole_run(model, images, parameters))


def test_a_run_that_does_not_repeat_itself_starts_anew():
    torch.manual_seed(0)
    model, images = Alternating().eval(), torch.randn(2, 3, 8, 8)
    prefix = Prefix(model, images, ["three"])  # The first time, by way of `one`.
    prefix.move_to(["three"])  # The second time it meets `two`, the third time it is as the first.
    assert same(prefix.rerun({}), model.three(model.two(images)))


def test_what_comes_before_the_layer_runs_once():
    model, runs = InPlace(), []

    def counting(name):
        forward = model.get_submodule(name).forward
        return lambda images: runs.append(name) or forward(images)

    for name in ("stem", "two"):
        model.get_submodule(name).forward = counting(name)
    prefix = Prefix(model, torch.randn(1, 3, 8, 8), ["two"])
    for _ in range(3):
        prefix.rerun({})
    assert runs == ["stem", "two", "two", "two"]


def test_of_several_layers_the_first_that_runs_counts():
    torch.manual_seed(0)
    model, images = InPlace().eval(), torch.randn(2, 3, 8, 8)
    parameters = {name: torch.randn_like(model.get_parameter(name)) for name in ("head.weight", "one.bias")}
    prefix = Prefix(model, images, ["head", "one"])
    assert same(prefix.rerun(parameters), whole_run(model, images, parameters))


def test_a_layer_that_never_runs_costs_whole_runs():
    model, images = InPlace().eval(), torch.randn(2, 3, 8, 8)
    model.unused = nn.Linear(2, 2)
    assert same(Prefix(model, images, ["unused"]).rerun({}), whole_run(model, images, {}))


def test_the_model_is_as_before_even_after_an_error():
    model = InPlace().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        Prefix(model, torch.randn(1, 4, 8, 8), ["two"])
    Prefix(model, torch.randn(1, 3, 8, 8), ["two"]).rerun({})
    assert model.training
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
