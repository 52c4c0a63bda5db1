"""Channels that a user wants kept survive, whatever else is pruned."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from compress_search.compression import compress
from compress_search.exceptions import ModelError, RatioError
from compress_search.methods import METHODS
from compress_search.methods.channel_pruning import ChannelPruning
from compress_search.profile import profile_model
from compress_search.recipe import Compress
from compress_search.selection import SELECTORS
from compress_search.selection.choices import in_words
from compress_search.selection.uniform import select_uniform

_spec = importlib.util.spec_from_file_location("zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(zoo)

EXAMPLE = torch.zeros(zoo.EXAMPLE_SHAPE)
BATCHES = [
    torch.randn(16, *zoo.EXAMPLE_SHAPE[1:], generator=torch.Generator().manual_seed(3)) for _ in range(4)
]

KEPT = {
    "Residual": {"conv1": (7, 0), "conv2": (2,), "conv4": (1, 11)},
    "Concatenation": {"left": (5,), "right": (0, 9), "merge": (3,), "hidden": (0, 1, 2)},
    "DepthwiseWithGate": {"depthwise": (0, 1, 23), "squeeze": (5,), "project": (4,)},
    "Reused": {"alias": (6, 2), "grouped": (1,)},
    "Grouped": {"small": (0, 23), "large": (11,), "up": (7,)},
    "Shuffled": {"branch.0": (3, 11), "mix": (0,)},
}
with_and_without_data = pytest.mark.parametrize("batches", [[], BATCHES], ids=["data-free", "data-aware"])


def _outputs_kept(step) -> dict[str, tuple[int, ...]]:
    return {edit.layer: edit.outputs for edit in step.edits if edit.outputs is not None}


@with_and_without_data
@pytest.mark.parametrize("net", KEPT)
def test_they_stay_at_the_smallest_size(net, batches):
    model = zoo.build(net)
    for name in KEPT[net]:
        # As the worst of all, so that no choice would keep them by itself.
        model.get_submodule(name).weight.data[list(KEPT[net][name])] *= 1e-3
    analysis = ChannelPruning().analyse(model, EXAMPLE, keep_channels=KEPT[net])
    assert any(unit.least > 1 for unit in analysis.units)
    sizes = {unit.name: unit.least for unit in analysis.units}
    compressed = analysis.apply(sizes, batches)
    assert profile_model(compressed.model, EXAMPLE).macs == analysis.predict_macs(sizes)
    outputs = _outputs_kept(compressed.step)
    wanted = {"shared" if name == "alias" else name: channels for name, channels in KEPT[net].items()}
    cut = wanted.keys() & outputs.keys()
    assert cut
    for name in cut:
        assert set(wanted[name]) <= set(outputs[name])
    for name in wanted.keys() - cut:
        before, after = model.get_submodule(name).weight, compressed.model.get_submodule(name).weight
        assert len(before) == len(after)


@with_and_without_data
@pytest.mark.parametrize("round_to", [1, 4])
def test_they_stay_under_uniform_selection(round_to, batches):
    model, kept = zoo.build("Residual"), {"conv1": (0, 3, 4, 5, 7)}
    analysis = ChannelPruning().analyse(model, EXAMPLE, keep_channels=kept)
    sizes = select_uniform(analysis, 0.5, round_to=round_to)
    size = sizes.get("conv1", 8)
    assert size >= 5
    compressed = analysis.apply(sizes, batches)
    assert profile_model(compressed.model, EXAMPLE).macs == analysis.predict_macs(sizes)
    assert compressed.step.mac_ratio <= 0.5
    assert set(kept["conv1"]) <= set(_outputs_kept(compressed.step).get("conv1", range(8)))
    if round_to == 4:
        # Five of eight cannot be a multiple of four but eight.
        assert size == 8


def test_what_is_coupled_to_them_stays_too():
    model = zoo.build("Residual")
    analysis = ChannelPruning().analyse(model, EXAMPLE, keep_channels={"conv2": (1, 6), "stem": (3,)})
    (unit,) = [unit for unit in analysis.units if unit.name == "stem"]
    assert unit.least == 3
    step = analysis.apply({"stem": 3}, []).step
    assert _outputs_kept(step) == {"stem": (1, 3, 6), "bn": (1, 3, 6), "conv2": (1, 3, 6), "bn2": (1, 3, 6)}


def test_a_smaller_size_is_refused_with_the_reason():
    analysis = ChannelPruning().analyse(zoo.build("Residual"), EXAMPLE, keep_channels={"conv1": (1, 2, 6)})
    with pytest.raises(ModelError, match=r"'conv1' cannot be pruned to 2 blocks; allowed: \[3, 8\] \(3 hold"):
        analysis.apply({"conv1": 2}, [])


def test_a_ratio_that_they_hold_up_names_them():
    kept = {"conv1": tuple(range(7)), "stem": tuple(range(8)), "conv4": tuple(range(12))}
    analysis = ChannelPruning().analyse(zoo.build("Residual"), EXAMPLE, keep_channels=kept)
    smallest = analysis.predict_macs({unit.name: unit.least for unit in analysis.units})
    with pytest.raises(
        RatioError, match=r"conv1 \(you asked to keep channels in 7 of its 8 blocks\)"
    ) as raised:
        select_uniform(analysis, 0.1)
    assert in_words(smallest / analysis.profile.macs) in str(raised.value)


def test_the_networks_output_stays_anyway():
    analysis = ChannelPruning().analyse(zoo.build("Residual"), EXAMPLE, keep_channels={"head": (0, 4)})
    assert all(unit.least == 1 for unit in analysis.units)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"conv5": (0,)}, r"names 'conv5', which is no convolution or linear layer\. Did you mean 'conv"),
        ({"bn1": (0,)}, r"names 'bn1', which is no"),
        (
            {"conv1": (0, 8)},
            r"names channel 8 of 'conv1', which has 8 output channels\. Give indices in \[0, 7\]",
        ),
        ({"conv1": (-1,)}, "names channel -1 of 'conv1'"),
    ],
)
def test_layers_and_channels_that_do_not_exist_are_named(method, wanted, says):
    with pytest.raises(ModelError, match=says):
        method.analyse(zoo.build("Residual"), EXAMPLE, keep_channels=wanted)


def test_all_faults_come_at_once():
    with pytest.raises(ModelError, match=r"(?s)'nothing'.*channel 99, 100 of 'head'"):
        ChannelPruning().analyse(
            zoo.build("Residual"), EXAMPLE, keep_channels={"nothing": (0,), "head": (99, 0, 100)}
        )


@with_and_without_data
@pytest.mark.parametrize("selection", SELECTORS)
def test_every_selector_keeps_them(selection, batches):
    kept = {"conv1": (0, 1, 2, 3, 4), "conv3": tuple(range(12))}
    stage = Compress(
        method="channel_pruning",
        mac_ratio=0.65,
        selection=selection,
        keep_channels=kept,
        shares={"conv1": 0.1} if selection == "manual" else {},
    )
    compressed = compress(zoo.build("Residual"), EXAMPLE, batches, stage)
    assert compressed.step.mac_ratio <= 0.65
    outputs = _outputs_kept(compressed.step)
    assert set(kept["conv1"]) <= set(outputs.get("conv1", range(8)))
    assert "conv3" not in outputs
