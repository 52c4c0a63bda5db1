"""Functions that would answer differently are told apart, and the same one is the same in every process."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from compress_search.function_identity import function_identity
from compress_search.task import accuracy

MODULE = """
import torch
from torch import nn

K = 1
LOG = []

def share(outputs, k):
    return float(outputs[:k].mean())

def evaluate(model, loader):
    return share(model(loader), K)

class Weighted(nn.Module):
    def __init__(self, weight=2.0):
        super().__init__()
        self.weight = weight

    def forward(self, outputs, targets):
        return self.weight * (outputs - targets).abs().mean()

class Judge:
    def __init__(self, k):
        self.k, self.seen = k, []

    def __call__(self, model, loader):
        self.seen.append(model)
        return self.k

def closing_over(k):
    seen = []
    def inner(model, loader):
        seen.append(model)
        return k
    return inner
"""


@pytest.fixture
def module(tmp_path):
    """Load the module, with some of its text replaced."""

    def load(old="", new=""):
        assert old in MODULE
        file = tmp_path / f"functions{len(list(tmp_path.iterdir()))}.py"
        file.write_text(MODULE.replace(old, new) if old else MODULE)
        spec = importlib.util.spec_from_file_location("functions", file)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    return load


def differ(*functions):
    return len({function_identity(function) for function in functions}) == len(functions)


def test_functions_of_libraries_are_known_by_name():
    assert function_identity(accuracy) == "accuracy"
    assert function_identity(functional.cross_entropy) == "cross_entropy"


def test_losses_are_told_apart_by_what_they_hold():
    weight = torch.tensor([1.0, 2.0])
    assert differ(
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.5),
        nn.CrossEntropyLoss(ignore_index=3),
        nn.CrossEntropyLoss(weight=weight),
        nn.CrossEntropyLoss(weight=weight + 1),
        nn.MSELoss(),
    )
    assert not differ(nn.CrossEntropyLoss(weight=weight), nn.CrossEntropyLoss(weight=weight.clone()))
    assert function_identity(nn.CrossEntropyLoss()).startswith("CrossEntropyLoss() ")


def test_partials_lambdas_and_closures_are_told_apart_by_their_values(module):
    share, closing_over = module().share, module().closing_over
    assert differ(*(functools.partial(share, k=k) for k in (1, 3)), share)
    assert differ(*(functools.partial(share, np.arange(k)) for k in (1, 3)))
    assert differ(lambda model, loader: 1, lambda model, loader: 2, lambda model, loader: model)
    assert differ(closing_over(1), closing_over(2), closing_over("1"), closing_over(torch.ones(1)))
    assert not differ(closing_over(2), closing_over(2))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("K = 1", "K = 2"),
        ("outputs[:k].mean()", "outputs[:k].sum()"),
        ("model(loader), K)", "model(loader), 1)"),
    ],
)
def test_a_function_is_its_code_and_what_it_uses_of_its_module(module, old, new):
    assert differ(module().evaluate, module(old, new).evaluate)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\n    return share", "\n    # The first alone.\n\n    return  share"),
        ("loader):\n    return share", 'loader):\n    """Judge."""\n    return share'),
        ("LOG = []", "LOG = [1]"),
        ("abs()", "square()"),
    ],
)
def test_what_does_not_change_the_answer_does_not_matter(module, old, new):
    assert not differ(module().evaluate, module(old, new).evaluate)


def test_a_module_is_its_code_and_its_settings(module):
    loss = module().Weighted
    assert differ(loss(), loss(3.0), module("abs()", "square()").Weighted())
    assert not differ(loss(), module().Weighted())


def test_an_object_is_its_code_and_its_settings_but_not_what_it_noted_down(module):
    judge = module().Judge(1)
    before = function_identity(judge)
    judge(None, None)
    assert function_identity(judge) == before
    assert differ(judge, module().Judge(2), module("return self.k\n", "return -self.k\n").Judge(1))
    noting = module().closing_over(1)
    before = function_identity(noting)
    noting(None, None)
    assert function_identity(noting) == before


def test_an_object_is_the_tensors_modules_and_functions_that_it_holds(module):
    judge = module().Judge
    weight = torch.tensor([1.0, 2.0])
    assert differ(judge(weight), judge(weight + 1), judge(np.ones(2)), judge(np.zeros(2)))
    assert differ(*(judge(nn.CrossEntropyLoss(weight=w)) for w in (weight, weight + 1)))
    assert differ(*(judge(functools.partial(max, k)) for k in (1, 2)), judge(module().share))
    assert not differ(judge(weight), judge(weight.clone()))


METHODS = """
class Rule:
    def __call__(self, model, loader):
        return self.share(model)
    def share(self, model):
        return self.part
    @property
    def part(self):
        return self.of(1)
    @staticmethod
    def of(whole):
        return 0.5 * whole
    def unused(self):
        return 0

class Inherits(Rule):
    pass

class Half(nn.Module):
    def forward(self, outputs, targets):
        return self.part(outputs)
    def part(self, outputs):
        return 0.5 * outputs.mean()
"""


@pytest.mark.parametrize(
    "make",
    [
        lambda loaded: loaded.Rule(),
        lambda loaded: loaded.Rule().share,
        lambda loaded: loaded.Inherits(),
        lambda loaded: loaded.Half(),
    ],
)
def test_the_methods_that_an_object_uses_are_part_of_it(module, make):
    def load(old, new):
        return make(module("\nK = 1\n", METHODS.replace(old, new)))

    assert differ(load("0.5", "0.5"), load("0.5", "0.25"))
    assert not differ(load("0.5", "0.5"), load("return 0\n", "return 1\n"))


def test_functions_that_call_each_other_or_themselves_end():
    def even(number):
        return number == 0 or odd(number - 1)

    def odd(number):
        return number != 0 and even(number - 1)

    assert differ(even, odd)


def test_it_is_the_same_in_another_process(module, tmp_path):
    here = module()
    (file,) = tmp_path.iterdir()
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {file.stem} as f\n"
        "from compress_search.function_identity import function_identity\n"
        "for one in (f.evaluate, f.Weighted(), f.Judge(1), f.closing_over(frozenset('abc'))):\n"
        "    print(function_identity(one))"
    )
    functions = (here.evaluate, here.Weighted(), here.Judge(1), here.closing_over(frozenset("abc")))
    for _ in range(2):
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert said.stdout.splitlines() == [function_identity(one) for one in functions]
