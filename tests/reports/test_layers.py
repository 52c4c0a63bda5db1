from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress_search.exceptions import PlanError
from compress_search.methods import METHODS
from compress_search.plan import CompressionPlan, FactoriseLayer, KeepChannels, Part, PlanStep, apply_plan
from compress_search.profile import ModelProfile, profile_model
from compress_search.reports.layers import LayerRow, layer_table, total_row
from compress_search.selection.uniform import select_uniform


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = self.depthwise(torch.relu(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def _factorise(layer: str, inputs: int, rank: int, outputs: int) -> FactoriseLayer:
    vertical = {"in_channels": inputs, "out_channels": rank, "kernel_size": (3, 1), "padding": (1, 0)}
    horizontal = {"in_channels": rank, "out_channels": outputs, "kernel_size": (1, 3), "padding": (0, 1)}
    parts = (Part("vertical", "Conv2d", vertical), Part("horizontal", "Conv2d", horizontal))
    return FactoriseLayer(layer, rank, parts)


SVD = PlanStep(
    method="spatial_svd",
    mac_ratio=0.6,
    edits=(_factorise("conv2", 8, 9, 12),),
    left_alone={"conv1": "you asked to leave it alone", "head": "it is a Linear"},
)
PRUNING = PlanStep(
    method="channel_pruning",
    mac_ratio=0.5,
    edits=(
        KeepChannels("conv1", outputs=tuple(range(5))),
        KeepChannels("norm", outputs=tuple(range(5))),
        KeepChannels("conv2.vertical", inputs=tuple(range(5)), outputs=tuple(range(7))),
        KeepChannels("conv2.horizontal", inputs=tuple(range(7)), outputs=tuple(range(10))),
        KeepChannels("depthwise", outputs=tuple(range(10))),
        KeepChannels("head", inputs=tuple(range(10))),
    ),
    left_alone={"head": "it makes the network's output"},
)


def _profile(plan: CompressionPlan) -> ModelProfile:
    return profile_model(apply_plan(Net().eval(), plan), torch.zeros(1, 3, 6, 6))


def _table(*steps: PlanStep) -> dict[str, LayerRow]:
    plan = CompressionPlan(steps)
    rows = layer_table(plan, _profile(CompressionPlan()), _profile(plan))
    return {row.layer: row for row in rows}


def test_an_empty_plan_did_nothing() -> None:
    table = _table()
    assert list(table) == ["conv1", "conv2", "depthwise", "head"]
    assert {row.done for row in table.values()} == {""}
    assert {row.ratio for row in table.values()} == {1.0}


def test_both_methods_on_one_layer_make_one_row() -> None:
    table = _table(SVD, PRUNING)
    assert {name: row.done for name, row in table.items()} == {
        "conv1": "channels 8 -> 5 out",
        "conv2": "spatial SVD, rank 9 -> 7; channels 8 -> 5 in, 12 -> 10 out",
        "depthwise": "channels 12 -> 10",
        "head": "channels 12 -> 10 in",
    }
    pixels = 6 * 6
    assert (table["conv2"].macs_before, table["conv2"].macs_after) == (
        12 * 8 * 9 * pixels,
        (7 * 5 * 3 + 10 * 7 * 3) * pixels,
    )
    assert table["depthwise"].macs_after == 10 * 9 * pixels


def test_rows_add_up_to_the_models() -> None:
    plan = CompressionPlan((SVD, PRUNING))
    before, after = _profile(CompressionPlan()), _profile(plan)
    total = total_row(layer_table(plan, before, after))
    assert (total.macs_before, total.macs_after) == (before.macs, after.macs)
    assert total.ratio == after.mac_ratio(before)


def test_pruning_before_factorising_stays_visible() -> None:
    prune = PlanStep(
        method="channel_pruning",
        mac_ratio=0.8,
        edits=(
            KeepChannels("conv1", outputs=tuple(range(5))),
            KeepChannels("norm", outputs=tuple(range(5))),
            KeepChannels("conv2", inputs=tuple(range(5))),
        ),
    )
    svd = PlanStep(method="spatial_svd", mac_ratio=0.6, edits=(_factorise("conv2", 5, 6, 12),))
    assert _table(prune, svd)["conv2"].done == "spatial SVD, rank 6; channels 8 -> 5 in"


def test_a_part_that_is_factorised_again_is_followed() -> None:
    thin = {"in_channels": 9, "out_channels": 4, "kernel_size": 1}
    wide = {"in_channels": 4, "out_channels": 12, "kernel_size": (1, 3), "padding": (0, 1)}
    again = FactoriseLayer(
        "conv2.horizontal", 4, (Part("first", "Conv2d", thin), Part("second", "Conv2d", wide))
    )
    row = _table(SVD, PlanStep(method="weight_svd", mac_ratio=0.9, edits=(again,)))["conv2"]
    assert row.done == "spatial SVD and weight SVD, ranks 9, 4"
    assert row.macs_after == (8 * 9 * 3 + 9 * 4 + 4 * 12 * 3) * 6 * 6


def test_reasons_name_the_method_and_are_not_repeated() -> None:
    twice = PlanStep(
        method="channel_pruning",
        mac_ratio=1.0,
        edits=(),
        left_alone={"conv2.vertical": "it meets a gate", "conv2.horizontal": "it meets a gate"},
    )
    table = _table(SVD, twice)
    assert table["conv1"].left_alone == "spatial SVD: you asked to leave it alone"
    assert table["conv2"].left_alone == "channel pruning: it meets a gate"
    assert table["depthwise"].left_alone == ""
    both = _table(SVD, PRUNING)["head"].left_alone
    assert both == "spatial SVD: it is a Linear; channel pruning: it makes the network's output"


def test_profiles_of_another_model_are_refused() -> None:
    plan = CompressionPlan((SVD,))
    dense = _profile(CompressionPlan())
    with pytest.raises(PlanError, match=r"there should be a layer 'conv2\.vertical'"):
        layer_table(plan, dense, dense)
    elsewhere = PlanStep(method="spatial_svd", mac_ratio=0.6, edits=(_factorise("conv9", 8, 9, 12),))
    with pytest.raises(PlanError, match="factorises 'conv9'"):
        layer_table(CompressionPlan((elsewhere,)), dense, dense)


def test_a_pointwise_layer_under_spatial_svd_is_said_to_be_the_weight_svd() -> None:
    reduce = {"in_channels": 8, "out_channels": 3, "kernel_size": (1, 1)}
    expand = {"in_channels": 3, "out_channels": 12, "kernel_size": (1, 1)}
    edit = FactoriseLayer("conv2", 3, (Part("reduce", "Conv2d", reduce), Part("expand", "Conv2d", expand)))
    row = _table(PlanStep(method="spatial_svd", mac_ratio=0.9, edits=(edit,)))["conv2"]
    assert row.done == "weight SVD of a 1x1 kernel, rank 3"


class WithHeadOfTraining(nn.Module):
    """A transposed convolution, a pointwise one, and a head that runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix = nn.ConvTranspose2d(3, 8, 2, stride=2), nn.Conv2d(8, 12, 1)
        self.head, self.aux = nn.Conv2d(12, 5, 3), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        x = torch.relu(self.mix(torch.relu(self.up(x))))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_the_reasons_of_the_methods_reach_the_table() -> None:
    model, example = WithHeadOfTraining().eval(), torch.randn(1, 3, 6, 6)
    before, plan = profile_model(model, example), CompressionPlan()
    for name in ("spatial_svd", "channel_pruning"):
        compressed_so_far = apply_plan(model, plan)
        analysis = METHODS[name].analyse(compressed_so_far, example)
        plan = plan.then(analysis.apply(select_uniform(analysis, 0.6), []).step)
    compressed = apply_plan(model, plan)
    rows = {row.layer: row for row in layer_table(plan, before, profile_model(compressed, example))}
    assert list(rows) == ["up", "mix", "head", "aux"]
    assert "weight SVD of a 1x1 kernel, rank" in rows["mix"].done
    assert "weight_svd can factorise a ConvTranspose2d" in rows["up"].left_alone
    assert rows["head"].left_alone == "channel pruning: it makes the network's output"
    aux = rows["aux"]
    assert (aux.macs_before, aux.macs_after, aux.ratio) == (0, 0, 1.0)
    assert aux.done == "channels cut along"
    assert aux.left_alone.startswith(
        "spatial SVD: it did not run on the example input; channel pruning: it did"
    )
