"""Which channels stay does not depend on how the work is divided."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from compress_search.methods import METHODS
from compress_search.methods.brain_surgeon import remove_blocks
from compress_search.methods.channel_choice import (
    choose_blocks,
    consumers_of_group,
    input_moments,
    largest_blocks,
)
from compress_search.methods.low_rank import factorise
from compress_search.methods.output_sensitivity import output_sensitivities

_spec = importlib.util.spec_from_file_location("zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(zoo)


def test_groups_whose_gram_matrices_do_not_fit_together_are_chosen_one_by_one(monkeypatch):
    model = zoo.build("Grouped")
    groups = METHODS["channel_pruning"].analyse(model, torch.zeros(zoo.EXAMPLE_SHAPE)).coupling.groups
    batches = [torch.randn(8, *zoo.EXAMPLE_SHAPE[1:]) for _ in range(3)]
    sizes = {group.name: max(1, group.size // 2) for group in groups}
    protected = {group.name: () for group in groups}
    together = choose_blocks(model, groups, sizes, batches, protected=protected)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    monkeypatch.setattr("compress_search.methods.channel_choice._GRAM_ELEMENTS", 1)
    assert choose_blocks(model, groups, sizes, batches, protected=protected) == together
    # For each group one to measure and three batches; one group feeds a transposed convolution alone.
    assert len(runs) == (len(groups) - 1) * 4 > 4


@pytest.mark.parametrize("net", ["Grouped", "Concatenation"])
def test_moments_are_held_no_longer_than_they_are_needed(net, monkeypatch):
    model = zoo.build(net)
    groups = METHODS["channel_pruning"].analyse(model, torch.zeros(zoo.EXAMPLE_SHAPE)).coupling.groups
    batches = [torch.randn(8, *zoo.EXAMPLE_SHAPE[1:])]
    held, needed = [], []

    def measured(*arguments):
        held.append(input_moments(*arguments))
        return held[-1]

    def removed(consumers, **arguments):
        # Those of the groups that come after this one.
        needed.append(groups[len(needed) + 1 :])
        assert held[0].keys() <= {member.layer for group in needed[-1] for member in group.consumers}
        return remove_blocks(consumers, **arguments)

    monkeypatch.setattr("compress_search.methods.channel_choice.input_moments", measured)
    monkeypatch.setattr("compress_search.methods.channel_choice.remove_blocks", removed)
    sizes = {group.name: max(1, group.size // 2) for group in groups}
    choose_blocks(model, groups, sizes, batches, protected={group.name: () for group in groups})
    assert len(needed) > 1
    assert held == [{}]


def test_without_data_the_channels_of_the_largest_weights_stay(monkeypatch):
    monkeypatch.setattr("compress_search.methods.channel_choice._OUTPUTS_AT_A_TIME", 3)
    model = zoo.build("Residual")
    groups = METHODS["channel_pruning"].analyse(model, torch.zeros(zoo.EXAMPLE_SHAPE)).coupling.groups
    (group,) = [group for group in groups if group.name == "conv1"]
    scores = sum(
        model.get_submodule(name).weight.detach().double().square().sum(dim=axes)
        / model.get_submodule(name).weight.detach().double().square().sum()
        for name, axes in (("conv1", (1, 2, 3)), ("conv2", (0, 2, 3)))
    )
    assert largest_blocks(model, group, 3, ()) == tuple(sorted(scores.topk(3).indices.tolist()))


@pytest.fixture
def flattened():
    """A network whose first linear layer sees 9 features of each channel, and too few examples."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()]
    return (
        nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 9, 16), nn.ReLU(), nn.Linear(16, 4))
        .double()
        .eval()
    )


@pytest.mark.parametrize("number", [30, 200])
def test_a_wide_layers_channels_are_chosen_as_if_its_gram_matrix_fitted(flattened, number, monkeypatch):
    batches = list(torch.randn(number, 3, 7, 7).double().split(10))
    choices, solved = [], []
    for widest in (8192, 60):
        monkeypatch.setattr("compress_search.calibration.WIDEST", widest)
        analysis = METHODS["channel_pruning"].analyse(flattened, batches[0][:1])
        sizes = {unit.name: [unit.full_size // 2] for unit in analysis.units}
        solved.append({i.unit: i.parameters[sizes[i.unit][0]] for i in analysis.imitations(sizes, batches)})
        pruned = analysis.apply({name: size for name, (size,) in sizes.items()}, batches)
        choices.append(pruned.step.edits)
    assert choices[0] == choices[1]
    for unit, wanted in solved[0].items():
        for name, value in wanted.items():
            torch.testing.assert_close(solved[1][unit][name], value, rtol=1e-6, atol=1e-8)


def test_a_wide_layers_rank_is_chosen_as_if_its_gram_matrix_fitted(flattened, monkeypatch, caplog):
    batches = list(torch.randn(30, 3, 7, 7).double().split(10))
    imitated = []
    for widest in (8192, 60):
        monkeypatch.setattr("compress_search.calibration.WIDEST", widest)
        analysis = METHODS["weight_svd"].analyse(flattened, batches[0][:1])
        (imitation,) = analysis.imitations({"5": [3, 9]}, batches)
        imitated.append(imitation)
    for rank in (3, 9):
        wanted, found = (imitation.parameters[rank]["5.weight"] for imitation in imitated)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
        assert imitated[1].errors[rank] == pytest.approx(imitated[0].errors[rank], rel=1e-6)
    assert "no say" not in caplog.text


def test_the_inputs_of_a_wide_layer_of_even_more_outputs_have_no_say(monkeypatch, caplog):
    monkeypatch.setattr("compress_search.calibration.WIDEST", 10)
    model, batches = nn.Sequential(nn.Linear(12, 20)), [torch.randn(30, 12)]
    analysis = METHODS["weight_svd"].analyse(model, batches[0][:1])
    (imitation,) = analysis.imitations({"0": [4]}, batches)
    assert "its inputs have no say in its rank: 0." in caplog.text
    sensitivity = output_sensitivities(model, ["0"], batches)["0"]
    kept = factorise(model[0].weight.detach().T[None], None, sensitivity).truncated(4)
    expected = (kept.left @ kept.right)[0].T.float()
    torch.testing.assert_close(imitation.parameters[4]["0.weight"], expected)


def test_errors_of_all_consumers_count_in_nats_or_none_do(monkeypatch):
    model = zoo.build("Residual")
    groups = METHODS["channel_pruning"].analyse(model, torch.zeros(zoo.EXAMPLE_SHAPE)).coupling.groups
    (group,) = [group for group in groups if group.name == "conv1"]
    batches = [torch.randn(16, *zoo.EXAMPLE_SHAPE[1:]) for _ in range(3)]
    names = [member.layer for member in group.consumers]
    moments = input_moments(model, groups, batches)
    sensitivities = output_sensitivities(model, names, batches)
    for consumer, name in zip(consumers_of_group(model, group, moments, sensitivities), names, strict=True):
        scale = sensitivities[name].diagonal(dim1=1, dim2=2).mean()
        # A little of the mean is added to every channel.
        expected = sensitivities[name][0] + 0.3 * scale * torch.eye(len(sensitivities[name][0]))
        torch.testing.assert_close(consumer.root @ consumer.root.T, expected)
    some = dict(list(sensitivities.items())[1:])
    assert all(consumer.root is None for consumer in consumers_of_group(model, group, moments, some))


def test_channels_that_the_output_does_not_hear_go_first():
    """Of two pairs of channels, the output is deaf to what the second layer makes of one of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(6 * 16, 3)).eval()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[:3, :2] = torch.randn(3, 2, 1, 1)
        model[1].weight[3:, 2:] = 1.5 * model[1].weight[:3, :2]
        model[3].weight.view(3, 6, 16)[:, 3:] *= 1e-3
    batches = [torch.randn(32, 3, 4, 4) for _ in range(4)]
    analysis = METHODS["channel_pruning"].analyse(model, batches[0][:1])
    (edit,) = [edit for edit in analysis.apply({"0": 2}, batches).step.edits if edit.layer == "0"]
    assert edit.outputs == (0, 1)
