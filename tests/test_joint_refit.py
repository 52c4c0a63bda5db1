"""Refitting layers together: against the best pair of linear layers, and against leaving them as they are."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from compress_search.following import RECTIFIED, Following, find_following
from compress_search.joint_refit import Example, Link, given_to_next, refit_together
from compress_search.methods import METHODS
from compress_search.reconstruction import Refit, chains_of, refit_in_forward_order, with_following


def _error(model, examples):
    with torch.no_grad():
        return sum(float((model(e.inputs) - e.wanted).square().sum()) for e in examples)


def _pair():
    """Two linear layers through a bottleneck, and what a full matrix would put out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False))
    matrix = torch.randn(6, 6)
    inputs = torch.randn(8, 64, 6)
    examples = [Example(x, x @ matrix.T, None, number % 4 == 3) for number, x in enumerate(inputs)]
    return model, [Link("0", Following()), Link("1", Following(leading=("0",)))], examples


def test_two_linear_layers_come_near_the_best_matrix_of_their_rank(monkeypatch):
    model, links, examples = _pair()
    rows, wanted = torch.cat([e.inputs for e in examples]), torch.cat([e.wanted for e in examples])
    # Reduced-rank regression: the least squares fit, projected on the directions in which it varies most.
    fit = torch.linalg.lstsq(rows, wanted).solution
    _, _, directions = torch.linalg.svd(rows @ fit)
    best = float((rows @ fit @ directions[:2].T @ directions[:2] - wanted).square().sum())
    start = _error(model, examples)
    errors = []
    for rounds in (4, 100):
        monkeypatch.setattr("compress_search.joint_refit._ROUNDS", rounds)
        fitted = copy.deepcopy(model)
        refit_together(fitted, links, examples)
        errors.append(_error(fitted, examples))
    assert start > errors[0] > errors[1] > best
    # A fourth of the examples was not fitted.
    assert errors[1] < 1.05 * best


class Pair(nn.Module):
    """A layer that is normalised and clamped, another one, and a sum."""

    def __init__(self, groups: int, bias: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 2, 3, padding=1, groups=groups, bias=bias)

    def forward(self, x):
        return functional.relu(self.second(functional.relu(self.norm(self.first(x)))) + x)


LINKS = [
    Link("first", Following(("norm",), bounds=RECTIFIED)),
    Link("second", Following(bounds=RECTIFIED, leading=("first",))),
]


def _disturbed(original):
    model = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@settings(max_examples=25, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    batches=st.integers(1, 6),
    examples=st.integers(1, 40),
    seed=st.integers(0, 100),
)
def test_the_error_by_which_it_is_judged_never_grows(groups, bias, batches, examples, seed):
    torch.manual_seed(seed)
    original = Pair(groups, bias).eval()
    model = _disturbed(original)
    data = torch.randn(batches, examples, 2, 5, 5)
    with torch.no_grad():
        known = [Example(x, original(x), x, number % 4 == 3) for number, x in enumerate(data)]
    judged = [example for example in known if example.held_out] or known
    before = _error(model, judged)
    refit_together(model, LINKS, known)
    assert _error(model, judged) <= before


def test_the_chain_is_what_the_model_computes():
    torch.manual_seed(0)
    model, x = Pair(1, True).eval(), torch.randn(3, 2, 5, 5)
    with torch.no_grad():
        assert torch.equal(given_to_next(model, LINKS[:1], x), functional.relu(model.norm(model.first(x))))
        assert torch.equal(given_to_next(model, [], x), x)


def _known(original, *, batches=8):
    data = torch.randn(batches, 16, 2, 5, 5)
    with torch.no_grad():
        return [Example(x, original(x), x, number % 4 == 3) for number, x in enumerate(data)]


def test_the_same_again_and_no_gradients_left():
    torch.manual_seed(0)
    original = Pair(1, True).eval()
    model, known = _disturbed(original), _known(original)
    model.first.weight.requires_grad_(False)
    again = copy.deepcopy(model)
    before = _error(model, known)
    refit_together(model, LINKS, known)
    torch.rand(1)
    refit_together(again, LINKS, known)
    assert _error(model, known) < 0.5 * before
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.grad is None and one.requires_grad == (name != "first.weight")
    torch.testing.assert_close(model.norm.running_mean, original.norm.running_mean, rtol=0, atol=0)


def test_what_other_modules_share_stays():
    torch.manual_seed(0)
    original = Pair(1, True).eval()
    model, known = _disturbed(original), _known(original)
    model.other = nn.Conv2d(4, 2, 3)
    model.other.weight = model.second.weight
    shared, own = model.second.weight.detach().clone(), model.first.weight.detach().clone()
    refit_together(model, LINKS, known)
    assert torch.equal(model.second.weight, shared)
    assert not torch.equal(model.first.weight, own)


def test_what_does_harm_is_taken_back(monkeypatch):
    torch.manual_seed(0)
    original = Pair(1, True).eval()
    model, known = _disturbed(original), _known(original)
    before = copy.deepcopy(model.state_dict())
    for rate in (1e3, math.nan):
        monkeypatch.setattr("compress_search.joint_refit._RATE", rate)
        refit_together(model, LINKS, known)
        for name, value in before.items():
            assert torch.equal(model.state_dict()[name], value)


class NoGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("no backward")


def test_without_gradients_the_weights_stay(caplog):
    class Strange(nn.Conv2d):
        def forward(self, x):
            return NoGradients.apply(super().forward(x))

    torch.manual_seed(0)
    original = Pair(1, True).eval()
    original.second = Strange(4, 2, 3, padding=1)
    model, known = _disturbed(original), _known(original)
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING, logger="compress_search"):
        refit_together(model, LINKS, known)
    assert "first, second are not refitted together" in caplog.text
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)


def test_without_examples_to_fit_nothing_changes():
    torch.manual_seed(0)
    original = Pair(1, True).eval()
    model = _disturbed(original)
    before = copy.deepcopy(model.state_dict())
    for known in ([], _known(original)[3:4]):
        refit_together(model, LINKS, known)
        for name, value in before.items():
            assert torch.equal(model.state_dict()[name], value)


class Bottleneck(nn.Module):
    """Three layers and a sum; the first is heard elsewhere if asked for."""

    def __init__(self, *, heard: bool = False, late: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.late = nn.Conv2d(4, 4, 1) if late else None
        self.heard = heard

    def forward(self, x):
        x = self.stem(x).sigmoid()
        first = functional.relu6(self.norm(self.a(x)))
        second = functional.relu(self.b(first), inplace=True)
        beside = x if self.late is None else self.late(x)
        out = functional.relu(self.c(second) + beside)
        return (out, first) if self.heard else out


EXAMPLE = torch.zeros(1, 3, 8, 8)


def test_a_layer_is_led_to_by_those_that_nobody_else_hears():
    leading = {name: f.leading for name, f in find_following(Bottleneck().eval(), EXAMPLE).items()}
    assert leading == {"stem": (), "a": (), "b": ("a",), "c": ("a", "b")}


def test_what_the_model_gives_is_heard_by_somebody():
    leading = {name: f.leading for name, f in find_following(Bottleneck(heard=True).eval(), EXAMPLE).items()}
    assert leading == {"stem": (), "a": (), "b": (), "c": ("b",)}


def test_what_is_added_must_be_there_before_the_first():
    found = find_following(Bottleneck(late=True).eval(), EXAMPLE)
    assert found["c"].other is not None
    assert found["c"].leading == ()


def test_a_normalisation_of_two_layers_leads_nowhere():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.b(functional.relu(self.norm(self.a(x)))))

    assert find_following(Shared().eval(), EXAMPLE)["b"].leading == ()


def _refits(model, pruned):
    names = ["a", "b", "c"]
    refits = [Refit(n, n, outputs=(0, 1) if n in pruned else None) for n in names]
    return with_following(refits, model.eval(), EXAMPLE)


@pytest.mark.parametrize(
    ("pruned", "chains"),
    [("ab", ["abc"]), ("a", ["abc"]), ("b", ["abc"]), ("c", ["a", "b", "c"]), ("", ["a", "b", "c"])],
)
def test_layers_are_chained_where_outputs_in_between_were_lost(pruned, chains):
    model = Bottleneck()
    found = chains_of(model, _refits(model, pruned))
    assert ["".join(refit.layer for refit in chain) for chain in found] == chains


def test_chains_are_not_longer_than_they_may_be(monkeypatch):
    monkeypatch.setattr("compress_search.reconstruction.LONGEST", 2)
    model = Bottleneck()
    found = chains_of(model, _refits(model, "ab"))
    assert ["".join(refit.layer for refit in chain) for chain in found] == ["a", "bc"]


def test_half_precision_and_other_sources_are_left_to_least_squares():
    model = Bottleneck()
    refits = _refits(model, "ab")
    other = [refits[0], Refit("b", "a", following=refits[1].following), refits[2]]
    assert [len(chain) for chain in chains_of(model, other)] == [1, 1, 1]
    model.b.half()
    assert [len(chain) for chain in chains_of(model, refits)] == [1, 1, 1]


def test_what_has_no_safe_gradient_is_left_to_least_squares():
    model = Bottleneck()
    refits = _refits(model, "ab")
    model.b = nn.Conv2d(2, 2, 1, stride=2)
    assert [len(chain) for chain in chains_of(model, refits)] == [1, 1, 1]


@pytest.mark.parametrize("memory", [2**27, 3 * 16 * 4 * 8 * 6 * 6 * 4])
def test_a_pruned_block_puts_out_more_of_what_it_did(memory, monkeypatch):
    monkeypatch.setattr("compress_search.reconstruction._CHAIN_BYTES", memory)
    torch.manual_seed(0)
    original = Bottleneck().eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(2)
    data = [torch.randn(16, 3, 8, 8) for _ in range(16)]
    test = torch.randn(64, 3, 8, 8)
    analysis = METHODS["channel_pruning"].analyse(original, EXAMPLE)
    sizes = {unit.name: 2 for unit in analysis.units if unit.name in "ab"}
    errors = []
    for longest in (1, 3):
        monkeypatch.setattr("compress_search.reconstruction.LONGEST", longest)
        model = analysis.apply(sizes, data).model
        with torch.no_grad():
            errors.append(float((model(test) - original(test)).square().mean()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize(
    ("examples", "counts"),
    [(1000, [16, 16, 16, 16]), (64, [16, 16, 16, 16]), (40, [16, 14, 10]), (16, [12, 4]), (1, [])],
)
def test_as_many_examples_are_kept_as_there_is_room_for(examples, counts, monkeypatch):
    # Each takes 4 * (3 * 5 * 5 + 3 * 5 * 5) bytes. A quarter of the room is for the batch that is held out.
    monkeypatch.setattr("compress_search.reconstruction._CHAIN_BYTES", examples * 600)
    seen = []
    monkeypatch.setattr("compress_search.reconstruction.refit_together", lambda *given: seen.append(given))
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    data = [torch.randn(16, 3, 5, 5) for _ in range(4)]
    METHODS["channel_pruning"].analyse(original, data[0][:1]).apply({"0": 2}, data)
    ((_, links, kept),) = seen
    # The first layer that lost outputs is among them, though its own inputs are what they were.
    assert [link.layer for link in links] == ["0", "2"]
    assert [len(example.inputs) for example in kept] == counts
    places = [0, 1, 2, 3] if len(kept) == 4 else [0, 1, 3] if len(kept) == 3 else [0, 3]
    assert [example.held_out for example in kept] == [place == 3 for place in places][: len(kept)]
    with torch.no_grad():
        for example, place in zip(kept, places, strict=False):
            count, batch = len(example.inputs), data[place]
            assert torch.equal(example.inputs, batch[:count])
            torch.testing.assert_close(example.wanted, original(batch)[:count])
            assert example.inputs.untyped_storage().nbytes() in (count * 300, 16 * 300)


def test_without_pruned_outputs_least_squares_alone_is_at_work(monkeypatch):
    monkeypatch.setattr("compress_search.reconstruction.refit_together", lambda *_: pytest.fail("not asked"))
    torch.manual_seed(0)
    original = Bottleneck().eval()
    model = copy.deepcopy(original)
    data = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    refit_in_forward_order(model, original, [Refit(name, name) for name in "abc"], data)
    for one, other in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("budget", "learnt", "judged"), [(2**25, 16, 64), (3 * 48, 3, 3), (1, 1, 1)])
def test_the_layers_are_given_no_more_than_memory_allows(monkeypatch, budget, learnt, judged):
    # An example is 6 numbers that go in and 6 that are wanted, 48 bytes.
    monkeypatch.setattr("compress_search.joint_refit._PIECE_BYTES", budget)
    model, links, examples = _pair()
    before = _error(model, examples)
    sizes = {True: 0, False: 0}

    def note(layer, inputs):
        learning = torch.is_grad_enabled()
        sizes[learning] = max(sizes[learning], len(inputs[0]))

    handle = model[0].register_forward_pre_hook(note)
    refit_together(model, links, examples)
    handle.remove()
    assert sizes == {True: learnt, False: judged}
    assert _error(model, examples) < before
