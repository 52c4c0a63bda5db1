"""What follows a layer, and refits that look at it."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress_search.following import Following, Place, find_following
from compress_search.reconstruction import (
    Refit,
    Visit,
    _refine,
    before_clamp,
    refit_in_forward_order,
    refit_on,
)

RELU = (0.0, math.inf)


class Block(nn.Module):
    def __init__(self, *, in_place: bool = False, clamp: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(4)
        self.clamp = clamp or nn.ReLU(inplace=in_place)
        self.in_place = in_place

    def forward(self, x):
        out = self.clamp(self.first_norm(self.first(x)))
        out = self.second_norm(self.second(out))
        if self.in_place:
            out += x
        else:
            out = x + out
        return self.clamp(out)


class Projected(Block):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        out = self.second_norm(self.second(functional.relu(self.first_norm(self.first(x)))))
        return functional.relu(out + self.shortcut(x))


class HeardTwice(nn.Module):
    """The output before the rectifier is heard as it is, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        out = self.conv(x)
        return torch.cat([torch.relu(out), out], dim=1)


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return torch.relu(self.conv(torch.relu(self.conv(x))))


def _with_statistics(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
    return model.eval()


EXAMPLE = torch.zeros(2, 4, 6, 6)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_branch_ends_in_a_sum_with_what_the_block_is_given(in_place):
    found = find_following(nn.Sequential(nn.Conv2d(4, 4, 1), Block(in_place=in_place)).eval(), EXAMPLE)
    assert found["1.first"] == Following(("1.first_norm",), bounds=RELU)
    assert found["1.second"] == Following(
        ("1.second_norm",), Place("0", is_input=False), RELU, leading=("1.first",)
    )
    # The block hears it twice, so it is not known only clamped.
    assert found["0"] == Following()


def test_the_sum_belongs_to_the_branch_that_ends_last():
    found = find_following(Projected().eval(), EXAMPLE)
    assert found["second"] == Following(("second_norm",), leading=("first",))
    assert found["shortcut"] == Following((), Place("second_norm", is_input=False), RELU)


def test_a_place_that_is_visited_twice_in_a_pass_is_no_place():
    # The first that is given or gives the block's input is a shared rectifier.
    found = find_following(nn.Sequential(Block(), Block()).eval(), EXAMPLE)
    assert found["1.second"].other == Place("0", is_input=False)


@pytest.mark.parametrize(
    ("clamp", "bounds"), [(nn.ReLU6(), (0.0, 6.0)), (nn.Hardtanh(), (-1.0, 1.0)), (nn.SiLU(), None)]
)
def test_bounds_of_other_clamps(clamp, bounds):
    assert find_following(Block(clamp=clamp).eval(), EXAMPLE)["first"].bounds == bounds


def test_what_is_heard_elsewhere_is_not_known_only_clamped():
    assert find_following(HeardTwice().eval(), EXAMPLE) == {"conv": Following()}


def test_layers_called_twice_are_left_out():
    assert find_following(CalledTwice().eval(), EXAMPLE) == {}


def test_a_model_in_training_mode_and_its_statistics_are_left_as_they_are():
    model = Block().train()
    before = copy.deepcopy(model.state_dict())
    find_following(model, EXAMPLE)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_before_undoes_after():
    model = _with_statistics(Block())
    following = Following(("second_norm",))
    outputs, change = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    moved = outputs + following.before(model, change)
    expected = following.after(model, outputs, change)
    torch.testing.assert_close(following.after(model, moved, None), expected, rtol=1e-4, atol=1e-5)


def test_a_channel_that_does_not_count_makes_nothing_good():
    model = _with_statistics(Block())
    with torch.no_grad():
        model.second_norm.weight[1] = 0.0
    change = Following(("second_norm",)).before(model, torch.ones(1, 4, 2, 2))
    assert torch.isfinite(change).all()
    assert not change[:, 1].any()
    assert change[:, 0].all()


def test_targets_before_a_clamp():
    have = torch.tensor([-2.0, 3.0, -2.0, 3.0, 7.0, 9.0, 4.0])
    want = torch.tensor([-5.0, -5.0, 1.0, 1.0, 1.0, 8.0, 8.0])
    target = before_clamp(have, want, (0.0, 6.0))
    assert target.tolist() == [-2.0, 0.0, 1.0, 1.0, 1.0, 9.0, 6.0]
    # Clamped, they are what is wanted; no nearer values are.
    assert torch.equal(target.clamp(0, 6), want.clamp(0, 6))


def _pruned_pair():
    """A block, and the same with half of the second layer's inputs silenced."""
    torch.manual_seed(0)
    original = _with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), Block()))
    model = copy.deepcopy(original)
    with torch.no_grad():
        model[1].first_norm.weight[:2] = 0.0
        model[1].first_norm.bias[:2] = 0.0
    batches = [torch.randn(16, 3, 10, 10) for _ in range(6)]
    return model, original, batches


def _error(model, original, batches):
    with torch.no_grad():
        return sum(float((model(batch) - original(batch)).square().sum()) for batch in batches)


def _clamped_fit(monkeypatch, rounds):
    """Fit ``2 x - 1``, which the original puts out only where it is above zero; below that it goes astray."""
    monkeypatch.setattr("compress_search.reconstruction._ROUNDS", rounds)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1))
    nn.init.zeros_(model[0].weight)
    inputs = torch.rand(4, 200, 1) * 2 - 1
    wanted = torch.where(inputs > 0.5, 2 * inputs - 1, -0.2 - 0.1 * torch.rand(4, 200, 1))
    refit = Refit("0", source="0", following=Following(bounds=RELU))
    with torch.no_grad():
        visits = [
            Visit(number, 0.25, seen, model(seen), target)
            for number, (seen, target) in enumerate(zip(inputs, wanted, strict=True))
        ]
        road = SimpleNamespace(visits=lambda *_: iter(visits))
        refit_on(road, model, [refit])
        return float((model(inputs).relu() - wanted.relu()).square().mean())


def test_what_is_clamped_may_be_anything_beyond_the_bound(monkeypatch):
    plain, few, many = (_clamped_fit(monkeypatch, rounds) for rounds in (0, 2, 20))
    assert few < 0.7 * plain
    assert many <= few


def test_rounds_that_do_harm_are_taken_back(monkeypatch):
    plain = _clamped_fit(monkeypatch, 0)
    # So far too far that it ends on the other side.
    monkeypatch.setattr("compress_search.reconstruction._STRETCH", 50.0)
    assert _clamped_fit(monkeypatch, 5) == plain


class Straight(nn.Module):
    """A branch of one layer, which hears what it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return x + self.norm(self.conv(x))


def test_what_was_lost_before_the_sum_is_made_good(monkeypatch):
    original = _with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), Straight()))
    batches = [torch.randn(16, 3, 10, 10) for _ in range(6)]
    errors = {}
    for name, found in (("blind", lambda *_: {}), ("seeing", find_following)):
        model = copy.deepcopy(original)
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        monkeypatch.setattr("compress_search.reconstruction.find_following", found)
        refit_in_forward_order(model, original, [Refit("1.conv", source="1.conv")], batches)
        errors[name] = _error(model, original, batches)
    # The layer alone can be made to put out what it did; what is added to it is then still half of it.
    assert errors["seeing"] < 1e-4 * errors["blind"]


def test_rounds_on_a_part_of_the_visits_where_memory_is_short(monkeypatch):
    model, original, batches = _pruned_pair()
    seen = []
    monkeypatch.setattr("compress_search.reconstruction._KEPT_BYTES", 2 * 16 * 6 * 6 * 4 * 4 * 8)
    monkeypatch.setattr(
        "compress_search.reconstruction._refine",
        lambda *arguments: (seen.append(len(arguments[4])), _refine(*arguments)),
    )
    before = _error(model, original, batches)
    refit_in_forward_order(model, original, [Refit("1.second", source="1.second")], batches)
    assert 0 < seen[0] < len(batches)
    assert _error(model, original, batches) < before
