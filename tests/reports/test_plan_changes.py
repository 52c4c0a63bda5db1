from __future__ import annotations

from compress_search.plan import CompressionPlan, FactoriseLayer, KeepChannels, Part, PlanStep
from compress_search.reports.plan_changes import plan_changes

PARTS = (Part("vertical", "Conv2d", {}), Part("horizontal", "Conv2d", {}))
SVD = PlanStep(
    "spatial_svd", 0.7, (FactoriseLayer("a", 9, PARTS),), {"b": "it is small", "c": "it is linear"}
)


def changes(*steps: PlanStep) -> dict[str, tuple[str, str]]:
    found = plan_changes(CompressionPlan(steps))
    return {change.module: ("; ".join(change.done), "; ".join(change.left_alone)) for change in found}


def test_an_empty_plan_changed_nothing() -> None:
    assert changes() == {}


def test_the_parts_of_a_factorised_layer_are_that_layer_still() -> None:
    pruning = PlanStep(
        "channel_pruning",
        0.7,
        (
            KeepChannels("b", inputs=(0,), outputs=(0, 1)),
            KeepChannels("a.vertical", inputs=(0, 1), outputs=(0, 1, 2)),
            KeepChannels("a.horizontal", inputs=(0, 1, 2), outputs=(0, 1, 2, 3)),
        ),
        {"a.vertical": "it is coupled", "a.horizontal": "it is coupled"},
    )
    assert changes(SVD, pruning) == {
        "a": ("spatial SVD, rank 9; 2 channels in; rank 3; 4 channels out", "channel pruning: it is coupled"),
        "b": ("1 channels in; 2 channels out", "spatial SVD: it is small"),
        "c": ("", "spatial SVD: it is linear"),
    }


def test_a_part_that_is_factorised_again_is_its_layer_too() -> None:
    again = PlanStep("weight_svd", 0.7, (FactoriseLayer("a.vertical", 2, PARTS),))
    third = PlanStep("channel_pruning", 0.7, (KeepChannels("a.vertical.vertical", inputs=(0,)),))
    assert changes(SVD, again, third)["a"][0] == "spatial SVD, rank 9; weight SVD, rank 2; 1 channels in"
