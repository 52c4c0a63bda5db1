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
from compress_search.replay import Prefix

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
