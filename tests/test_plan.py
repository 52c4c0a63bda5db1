"""Plans as JSON, and the architectures they rebuild."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from compress_search.exceptions import PlanError
from compress_search.fingerprint import model_fingerprint
from compress_search.plan import CompressionPlan, FactoriseLayer, KeepChannels, Part, PlanStep, apply_plan
from compress_search.profile import profile_model

FACTORISE = FactoriseLayer(
    "3",
    rank=2,
    parts=(
        Part(
            "vertical", "Conv2d", {"in_channels": 4, "out_channels": 2, "kernel_size": (3, 1), "bias": False}
        ),
        Part("horizontal", "Conv2d", {"in_channels": 2, "out_channels": 8, "kernel_size": (1, 3)}),
    ),
)
PRUNE = (
    KeepChannels("0", outputs=(0, 3)),
    KeepChannels("1", outputs=(0, 3)),
    KeepChannels("3.vertical", inputs=(0, 3)),
)
PLAN = CompressionPlan(
    (
        PlanStep("spatial_svd", 0.6, (FACTORISE,), left_alone={"7": "a linear layer"}),
        PlanStep("channel_pruning", 0.8, PRUNE),
    )
)


def one_edit(edit):
    return CompressionPlan((PlanStep("any", 0.5, (edit,)),))


def test_a_plan_survives_json_unchanged(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert CompressionPlan.load(tmp_path / "plan.json") == PLAN
    assert CompressionPlan.from_dict(PLAN.to_dict()) == PLAN
    assert CompressionPlan.from_dict(CompressionPlan().to_dict()) == CompressionPlan()


@pytest.mark.parametrize(
    ("layer", "channels", "now"),
    [
        ("0", (0, 3), ("0", (0, 1))),
        ("0", (3,), ("0", (1,))),
        # What was factorised is made by its last part.
        ("3", (0, 7), ("3.horizontal", (0, 7))),
        ("7", (2,), ("7", (2,))),
    ],
)
def test_channels_of_the_original_are_found_after_the_plan(layer, channels, now):
    assert PLAN.outputs_after(layer, channels) == now


def test_channels_are_followed_through_several_steps():
    plan = PLAN.then(PlanStep("channel_pruning", 0.5, (KeepChannels("3.horizontal", outputs=(1, 4, 6)),)))
    plan = plan.then(PlanStep("channel_pruning", 0.5, (KeepChannels("3.horizontal", outputs=(0, 2)),)))
    assert plan.outputs_after("3", (1, 6)) == ("3.horizontal", (0, 1))
    with pytest.raises(PlanError, match="Channel 4 of '3' is to be kept, but an earlier step"):
        plan.outputs_after("3", (1, 4))


def test_then_adds_a_step_and_leaves_the_plan_alone():
    first, second = PLAN.steps
    start = CompressionPlan((first,))
    assert start.then(second) == PLAN
    assert start.steps == (first,)


def test_the_file_says_its_format_and_version(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert (stored["format"], stored["version"]) == ("compress_search.plan", 1)


def test_a_plan_rebuilds_the_architecture(tiny_net):
    model = tiny_net().train()
    before = model_fingerprint(model)
    compressed = apply_plan(model, PLAN)
    inputs = torch.randn(2, 1, 6, 6)
    # two channels into a 3x1 kernel of rank 2, 8 channels out of a 1x3 kernel; no padding, stride 1
    layers = {layer.name: layer.macs for layer in profile_model(model[:3], inputs).layers}
    rebuilt = {layer.name: layer.macs for layer in profile_model(compressed[:6], inputs).layers}
    assert layers["0"] == 4 * 9 * 36
    assert rebuilt == {"0": 2 * 9 * 36, "3.vertical": 2 * 2 * 3 * 24, "3.horizontal": 8 * 2 * 3 * 16}
    assert all(module.training for module in compressed.modules())
    assert model_fingerprint(model) == before


def test_kept_channels_hold_the_originals_weights(tiny_net):
    model = tiny_net()
    compressed = apply_plan(model, PLAN)
    assert torch.equal(compressed[0].weight, model[0].weight[[0, 3]])
    assert torch.equal(compressed[1].running_var, model[1].running_var[[0, 3]])


def test_a_module_under_several_names_is_replaced_under_each():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": layer, "again": layer})
    parts = (Part("a", "Linear", {"in_features": 4, "out_features": 1}),)
    compressed = apply_plan(model, one_edit(FactoriseLayer("first", 1, parts)))
    assert compressed["first"] is compressed["again"]
    assert isinstance(compressed["again"], nn.Sequential)


def test_parts_are_built_in_the_precision_of_the_layer(tiny_net):
    compressed = apply_plan(tiny_net().double(), PLAN)
    assert {p.dtype for p in compressed.parameters()} == {torch.float64}


def test_hooks_of_a_factorised_layer_are_called_with_what_replaces_it(tiny_net):
    model = tiny_net()
    seen = []
    layer = model.get_submodule("3")
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(("before", inputs[0].shape[1]))),
        layer.register_forward_hook(lambda *_: seen.append(("kwargs",)), with_kwargs=True),
        layer.register_forward_hook(lambda _module, _inputs, output: output * 0),
        layer.register_full_backward_hook(lambda _, __, given: seen.append(("backward", given[0].shape[1]))),
    ]
    FACTORISE.apply(model)
    output = model[:4](torch.zeros(1, 1, 6, 6, requires_grad=True))
    output.sum().backward()
    assert not output.any()
    assert seen == [("before", 4), ("kwargs",), ("backward", 8)]
    for handle in handles:
        handle.remove()
    assert model[:4](torch.ones(1, 1, 6, 6)).any()
    assert len(seen) == 3


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (False, True), (True, False), (False, False)])
def test_what_was_frozen_stays_frozen(tiny_net, weight, bias):
    model = tiny_net()
    model[3].weight.requires_grad_(weight)
    model[3].bias.requires_grad_(bias)
    factorised = apply_plan(model, PLAN)[3]
    wanted = {"vertical.weight": weight, "horizontal.weight": weight, "horizontal.bias": bias}
    assert {name: p.requires_grad for name, p in factorised.named_parameters()} == wanted


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (KeepChannels("9", outputs=(0,)), "changes '9', which Sequential does not have"),
        (KeepChannels("0", outputs=(0, 4)), "keeps channels that '0' does not have: it has 4 outputs"),
        (KeepChannels("3", inputs=(-1,)), "keeps channels that '3' does not have: it has 4 inputs"),
        (KeepChannels("2", outputs=(0,)), "cuts channels of '2', a ReLU"),
        (FactoriseLayer("2", 1, ()), "factorises '2', a ReLU without a weight"),
        (FactoriseLayer("3", 1, (Part("a", "Module", {}),)), "cannot build a 'Module'"),
        (FactoriseLayer("3", 1, (Part("a", "Linear", {"rank": 1}),)), "builds a Linear of {'rank': 1}"),
    ],
)
def test_a_plan_for_another_architecture_is_refused(tiny_net, edit, message):
    with pytest.raises(PlanError, match=message):
        apply_plan(tiny_net(), one_edit(edit))


def damaged(**changes):
    return PLAN.to_dict() | changes


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "it is a list"),
        ({}, "its format is None"),
        (damaged(format="onnx"), "its format is 'onnx'"),
        (damaged(version=2), "version 2; this compress_search reads version 1"),
        (damaged(steps=None), "damaged: TypeError"),
        (damaged(steps=["spatial_svd"]), "damaged: TypeError"),
        (damaged(steps=[{"method": "spatial_svd"}]), "damaged: KeyError: 'mac_ratio'"),
        (
            damaged(steps=[{"method": "m", "mac_ratio": 1, "edits": [{"edit": "melt"}], "left_alone": {}}]),
            "unknown edit 'melt'",
        ),
        (damaged(steps=[{"method": "m", "mac_ratio": 1, "edits": [], "left_alone": "all"}]), "damaged"),
    ],
)
def test_what_is_not_a_plan_is_refused(tmp_path, value, message):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(value))
    with pytest.raises(PlanError, match=message):
        CompressionPlan.load(path)


@pytest.mark.parametrize("content", [None, "{", b"\xff\xfe"])
def test_an_unreadable_file_is_named(tmp_path, content):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(PlanError, match=r"Cannot read a plan from .*plan\.json"):
        CompressionPlan.load(path)


def test_a_notebook_shows_every_change_and_reason():
    edits = (
        FactoriseLayer("stem", 5, (Part("vertical", "Conv2d", {}), Part("horizontal", "Conv2d", {}))),
        KeepChannels("body", inputs=(0, 1), outputs=(3,)),
        KeepChannels("norm", outputs=(3,)),
    )
    step = PlanStep("spatial_svd", 0.5, edits, {"head": "network <output>"})
    page = CompressionPlan((step,))._repr_html_()
    assert "rank 5: vertical Conv2d, horizontal Conv2d" in page
    assert "keeps 2 input channels and 1 output channels" in page
    assert "left alone: network &lt;output&gt;" in page
    assert page.count("spatial_svd to 0.5000 of the MACs") == 4
    assert "Nothing is changed" in CompressionPlan()._repr_html_()
