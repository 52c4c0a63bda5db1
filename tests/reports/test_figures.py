"""The figures beside the front: what they show is what was put in, on every kind of page and of study."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from compress_search.reports.figure_look import ANY, DARK, LIGHT, recoloured
from compress_search.reports.figures import study_figures
from compress_search.reports.hypervolume import draw_hypervolume, hypervolume, hypervolume_data
from compress_search.reports.layer_bars import draw_layer_bars, shortened
from compress_search.reports.layers import LayerRow
from compress_search.reports.learning_curves import draw_learning_curves, learning_curves_data
from compress_search.reports.ratio_split import draw_ratio_split, hyperbola, ratio_split_data
from compress_search.reports.sensitivity import LOSSES, StageSensitivity, draw_heat_map, heat_map
from compress_search.reports.stage_accuracy import draw_stage_accuracy, stage_accuracy_data
from compress_search.reports.stage_time_bars import draw_stage_times
from compress_search.reports.trials import StageTime, achieved_ratios
from compress_search.results import Candidate, ParetoFront, Reference, StageResult
from compress_search.selection.table import Cell, SensitivityTable
from compress_search.target import target_ends, target_text

Make = Callable[..., Candidate]
MakeFront = Callable[..., ParetoFront]

ROWS = (
    LayerRow("conv1", "Conv2d", "spatial SVD, rank 9", 300, 100, ""),
    LayerRow("fc", "Linear", "", 100, 100, "spatial SVD: it is a Linear"),
)
TABLE = StageSensitivity(
    "spatial_svd",
    LOSSES["divergence"],
    SensitivityTable((Cell("a", 1, 1.0), Cell("a", 3, 0.1), Cell("a", 5, 0.001, False), Cell("b", 2, 0.01))),
)


def _stages(*steps: tuple[str, float, float]) -> tuple[StageResult, ...]:
    """Stages of a name, an accuracy and a mac_ratio each."""
    return tuple(
        StageResult(f"key{n}", name, accuracy, round(1e6 * ratio), 1000, ratio, 2.0, reused=n == 0)
        for n, (name, accuracy, ratio) in enumerate(steps)
    )


@pytest.fixture
def front(make_candidate: Make, make_front: MakeFront) -> ParetoFront:
    both = _stages(
        ("spatial_svd", 0.9, 0.8),
        ("fine_tune", 0.97, 0.8),
        ("channel_pruning", 0.85, 0.5),
        ("fine_tune", 0.96, 0.5),
    )
    pruned = _stages(("channel_pruning", 0.8, 0.495), ("fine_tune", 0.95, 0.495))
    return make_front(
        make_candidate(0, 0.5, 0.96, stages=both),
        make_candidate(1, 0.495, 0.95, stages=pruned, params={"c_ssvd": 1.0, "c_cp": 0.495}),
        make_candidate(2, 0.7, 0.97, stages=_stages(("spatial_svd", 0.95, 0.7), ("fine_tune", 0.97, 0.7))),
        make_candidate(3, 0.5, 0.9, state="pruned", stages=both[:2]),
        make_candidate(4, 0.5, 0.9, state="running", stages=both[:1]),
        make_candidate(5, 0.5, 0.9, state="failed", stages=()),
    )


def test_the_line_of_a_trial_goes_through_its_stages(front: ParetoFront) -> None:
    data = stage_accuracy_data(front, chosen=front.candidates[0])
    assert data.stages == (
        "spatial_svd",
        "fine_tune after spatial_svd",
        "channel_pruning",
        "fine_tune after channel_pruning",
    )
    lines = {line.number: line for line in data.lines}
    assert set(lines) == {0, 1, 2, 3, 4}
    assert [(p.place, p.accuracy) for p in lines[0].points] == [(0, 0.9), (1, 0.97), (2, 0.85), (3, 0.96)]
    # A stage that was left out is passed over.
    assert [(p.place, p.accuracy) for p in lines[1].points] == [(2, 0.8), (3, 0.95)]
    assert [lines[n].standing for n in (2, 3, 4)] == ["outside the band", "pruned", "running"]


def test_every_line_begins_at_the_original_and_lines_are_apart(front: ParetoFront) -> None:
    drawn = draw_stage_accuracy(stage_accuracy_data(front, chosen=front.candidates[0]))
    traces = {trace.name: trace for trace in drawn.data}
    assert set(traces) == {
        "trial not complete",
        "trial outside the band",
        "trial on the front",
        "chosen: trial 0",
    }
    unfinished = traces["trial not complete"]
    assert unfinished.x == (0, 1, 2, None, 0, 1, None)
    assert [y if y is None else round(y, 9) for y in unfinished.y] == [98, 90, 97, None, 98, 90, None]
    assert "trial 3, pruned" in unfinished.hovertext[1]
    assert "reused" in unfinished.hovertext[1]
    assert "reused" not in unfinished.hovertext[2]
    labels = drawn.layout.xaxis.ticktext
    assert labels[:3] == ("original", "spatial SVD", "fine-tuning<br>after spatial SVD")


def test_the_ratios_multiply_to_what_the_trial_ended_with(front: ParetoFront) -> None:
    data = ratio_split_data(front, chosen=front.candidates[0])
    assert data is not None
    assert data.names == ("c_ssvd", "c_cp")
    assert [point.point.number for point in data.points] == [0, 1, 2]
    for point in data.points:
        assert point.first * point.second == pytest.approx(point.point.mac_ratio, rel=1e-12)
    assert (data.points[1].first, data.points[2].second) == (1.0, 1.0)


def test_methods_in_the_other_order_are_followed(make_candidate: Make, make_front: MakeFront) -> None:
    stages = _stages(("channel_pruning", 0.9, 0.8), ("spatial_svd", 0.9, 0.5))
    data = ratio_split_data(make_front(make_candidate(0, 0.5, 0.9, stages=stages)))
    assert data is not None
    assert (data.names, data.points[0].first, data.points[0].second) == (("c_cp", "c_ssvd"), 0.8, 0.625)


def test_one_method_has_nothing_to_share(make_candidate: Make, make_front: MakeFront) -> None:
    stages = _stages(("spatial_svd", 0.9, 0.5))
    candidate = make_candidate(0, 0.5, 0.9, stages=stages, params={"c_ssvd": 0.5})
    assert achieved_ratios(candidate.stages) == {"c_ssvd": 0.5}
    assert ratio_split_data(make_front(candidate)) is None


def test_the_band_lies_between_the_hyperbolas_of_its_ends(front: ParetoFront) -> None:
    for product in (0.2, 0.49, 1.0):
        curve = hyperbola(product)
        assert all(x * y == pytest.approx(product, rel=1e-12) for x, y in curve)
        assert curve[0][0] == pytest.approx(product) == curve[-1][1]
    data = ratio_split_data(front)
    assert data is not None
    band, target, *_ = draw_ratio_split(data).data
    products = {round(x * y, 9) for x, y in zip(band.x, band.y, strict=True)}
    assert products == {0.49, 0.51}
    assert {round(x * y, 9) for x, y in zip(target.x, target.y, strict=True)} == {0.5}


def test_a_range_has_a_curve_at_both_ends(front: ParetoFront) -> None:
    data = ratio_split_data(front)
    assert data is not None
    wide = dataclasses.replace(data, targets=(0.3, 0.8), band=(0.294, 0.816))
    traces = {trace.name: trace for trace in draw_ratio_split(wide).data}
    for target in (0.3, 0.8):
        curve = traces[f"c_ssvd x c_cp = {target}"]
        assert {round(x * y, 9) for x, y in zip(curve.x, curve.y, strict=True)} == {target}


@pytest.mark.parametrize(
    ("target", "ends", "text"), [(0.5, (0.5, 0.5), "0.5"), ((0.3, 0.8), (0.3, 0.8), "0.3 to 0.8")]
)
def test_a_target_is_one_ratio_or_a_range(target: Any, ends: tuple[float, float], text: str) -> None:
    assert (target_ends(target), target_text(target)) == (ends, text)


def test_colours_are_the_accuracies_and_infeasible_trials_have_another_symbol(front: ParetoFront) -> None:
    data = ratio_split_data(front, chosen=front.candidates[0])
    assert data is not None
    traces = {trace.name: trace for trace in draw_ratio_split(data).data}
    inside, outside = traces["trial in the band"], traces["trial outside the band"]
    assert inside.marker.color == (96.0, 95.0)
    assert inside.marker.symbol != outside.marker.symbol
    assert "outside the band" in outside.hovertext[0]
    assert (traces["chosen: trial 0"].x, traces["chosen: trial 0"].y) == ((0.8,), (0.625,))


def test_hypervolume_is_the_area_under_the_step_line() -> None:
    assert hypervolume([], (1.0, 0.0)) == 0.0
    assert hypervolume([(0.5, 0.9)], (1.0, 0.0)) == pytest.approx(0.45)
    assert hypervolume([(0.7, 0.95), (0.5, 0.9)], (1.0, 0.0)) == pytest.approx(0.5 * 0.9 + 0.3 * 0.05)
    # Beyond the reference point nothing counts.
    assert hypervolume([(1.2, 0.99), (0.5, 0.2)], (1.0, 0.3)) == 0.0
    draw = random.Random(0)
    points = [(draw.random(), draw.random()) for _ in range(20)]
    front = [p for p in points if not any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)]
    steps = 100_000
    best_within = sum(max((y for x, y in front if x <= (n + 0.5) / steps), default=0.0) for n in range(steps))
    assert hypervolume(front, (1.0, 0.0)) == pytest.approx(best_within / steps, abs=1e-4)


def test_the_front_grows_with_feasible_trials_alone(front: ParetoFront) -> None:
    data = hypervolume_data(front)
    assert data.numbers == (0, 1, 2, 3, 5)
    assert data.reference == (1.0, 0.0)
    one, two = 0.5 * 0.96, 0.5 * 0.96 + 0.005 * 0.95
    assert data.volumes == pytest.approx((one, two, two, two, two))
    drawn = draw_hypervolume(data).data[0]
    assert (drawn.x, drawn.y) == ((1, 2, 3, 4, 5), data.volumes)
    assert "trial 5" in drawn.hovertext[4]


def test_a_score_is_measured_from_the_worst_trial(make_candidate: Make, make_front: MakeFront) -> None:
    reference = Reference(accuracy=-1.0, macs=10, params=10)
    candidates = [make_candidate(0, 0.5, -3.0), make_candidate(1, 0.5, -2.0), make_candidate(2, 0.9, -4.0)]
    data = hypervolume_data(make_front(*candidates, reference=reference))
    assert data.reference == (1.0, -4.0)
    assert data.volumes == pytest.approx((0.5, 1.0, 1.0))


def test_layers_have_a_bar_before_and_after() -> None:
    before, after = draw_layer_bars(ROWS).data
    assert (before.x, after.x) == ((300, 100), (100, 100))
    assert after.text == ("0.33", "left alone")
    assert "spatial SVD, rank 9" in before.hovertext[0]
    assert "it is a Linear" in after.hovertext[1]
    assert draw_layer_bars(ROWS).layout.yaxis.ticktext == ("conv1", "fc")


def test_long_names_lose_their_middle() -> None:
    name = "backbone.layer4.2.conv2.horizontal"
    assert shortened(name, 40) == name
    short = shortened(name, 14)
    assert len(short) == 14
    assert name.startswith(short.split("…")[0])
    assert name.endswith(short.split("…")[1])


def test_a_heat_map_has_a_cell_for_each_size_from_the_right() -> None:
    data = heat_map(TABLE)
    assert data.logarithmic
    cells = draw_heat_map(data).data[0]
    assert list(map(list, cells.text)) == [["1", "3", "5"], ["", "", "2"]]
    assert cells.z[0] == pytest.approx((0.0, -1.0, -3.0))
    assert (cells.z[1][0], cells.z[1][2]) == (None, -2.0)
    assert "0.001 (from the measured ones)" in cells.hovertext[0][2]
    assert "0.1 (measured)" in cells.hovertext[0][1]


def test_drops_of_a_score_may_be_negative_and_are_not_logarithmic() -> None:
    cells = (Cell("a", 1, 0.2), Cell("a", 2, -0.1), Cell("a", 3, math.nan))
    data = heat_map(StageSensitivity("spatial_svd", LOSSES["score"], SensitivityTable(cells)))
    assert not data.logarithmic
    assert list(map(list, draw_heat_map(data).data[0].z)) == [[0.2, -0.1]]


def _tuned(*curve: float, ratio: float = 0.5) -> tuple[StageResult, ...]:
    compressed = StageResult("key", "spatial_svd", curve[0], 1000, 100, ratio, 1.0)
    return (
        compressed,
        dataclasses.replace(compressed, name="fine_tune", accuracy=max(curve), learning_curve=curve),
    )


def test_learning_curves_are_those_of_the_last_fine_tunings(
    make_candidate: Make, make_front: MakeFront
) -> None:
    front = make_front(
        make_candidate(0, 0.5, 0.96, stages=_tuned(0.9, 0.96, 0.95)),
        make_candidate(1, 0.7, 0.97, stages=_tuned(0.9, 0.97, 0.96, ratio=0.7)),
        # Given up in its last fine-tuning, and before its first epoch.
        make_candidate(2, 0.5, 0.9, state="pruned", stages=_tuned(0.8, 0.9)[:1], learning_curve=(0.8, 0.85)),
        make_candidate(3, 0.5, 0.9, state="running", stages=_tuned(0.8, 0.9)[:1], learning_curve=(0.8,)),
        make_candidate(4, 0.5, 0.95),
    )
    data = learning_curves_data(front, chosen=front.candidates[0])
    assert [(curve.number, curve.standing, curve.accuracies) for curve in data.curves] == [
        (0, "on the front", (0.9, 0.96, 0.95)),
        (1, "outside the band", (0.9, 0.97, 0.96)),
        (2, "pruned", (0.8, 0.85)),
    ]
    drawn = {trace.name: trace for trace in draw_learning_curves(data).data}
    assert list(drawn) == [
        "trial not complete",
        "trial outside the band",
        "trial on the front",
        "chosen: trial 0",
    ]
    assert (drawn["trial not complete"].x, drawn["trial not complete"].y) == (
        (0, 1, None),
        (80.0, 85.0, None),
    )
    assert drawn["chosen: trial 0"].hovertext[1] == (
        "<b>trial 0, on the front</b><br>epochs: 1<br>accuracy: 96.00 %<br>drop: +2.00 points"
    )


def test_stage_times_are_shown_in_a_unit_that_suits_them() -> None:
    rows = [StageTime("spatial_svd", 3, 5400.0, 1, 1800.0), StageTime("fine_tune", 3, 600.0, 0, 0.0)]
    computed, saved = draw_stage_times(rows).data
    assert draw_stage_times(rows).layout.xaxis.title.text == "hours, all trials"
    assert (computed.x, saved.x) == ((1.5, 600 / 3600), (0.5, 0.0))
    quick = draw_stage_times([StageTime("spatial_svd", 1, 5.0, 0, 0.0)])
    assert quick.layout.xaxis.title.text == "seconds, all trials"


def _figures(front: ParetoFront) -> dict[str, Any]:
    chosen = front.best[-1] if front.best else None
    details = {} if chosen is None else {"layers": ROWS, "sensitivities": [TABLE]}
    return {f.name: f for f in study_figures(front, chosen=chosen, **details)}  # type: ignore[arg-type]


def test_all_figures_of_a_study_look_right_on_every_page(front: ParetoFront) -> None:
    figures = _figures(front)
    assert list(figures) == ["front", "stages", "split", "hypervolume", "layers", "sensitivity-1", "times"]
    for figure in figures.values():
        drawn = {theme: figure.draw(theme=theme) for theme in (LIGHT, DARK, ANY)}
        layouts = {theme: json.loads(drawn[theme].layout.to_json()) for theme in drawn}
        assert recoloured(layouts[LIGHT], DARK) == layouts[DARK]
        assert drawn[LIGHT].data == drawn[DARK].data == drawn[ANY].data
        assert {drawn[theme].layout.font.color for theme in drawn} == {t.ink for t in (LIGHT, DARK, ANY)}
        assert json.loads(figure.draw(narrow=True).to_json())["layout"]["height"] > 100


@pytest.mark.parametrize("case", ["empty", "failed", "outside", "running"])
def test_a_study_without_an_answer_has_the_figures_that_it_can_have(
    case: str, make_candidate: Make, make_front: MakeFront
) -> None:
    front, names = {
        "empty": (make_front(), ["front"]),
        "failed": (
            make_front(make_candidate(0, 0.5, 0.9, state="failed", stages=())),
            ["front", "hypervolume"],
        ),
        "outside": (
            make_front(make_candidate(0, 0.9, 0.97)),
            ["front", "stages", "split", "hypervolume", "times"],
        ),
        "running": (make_front(make_candidate(0, 0.5, 0.9, state="running")), ["front", "stages", "times"]),
    }[case]
    figures = _figures(front)
    assert list(figures) == names
    for figure in figures.values():
        for narrow in (False, True):
            assert figure.draw(narrow=narrow).to_json()


def test_names_from_outside_are_escaped(make_candidate: Make, make_front: MakeFront) -> None:
    nasty = "<img src=x onerror=alert(1)>"
    row = LayerRow(nasty, nasty, nasty, 10, 5, nasty)
    table = StageSensitivity("spatial_svd", "nats", SensitivityTable((Cell(nasty, 1, 0.5),)))
    front = make_front(make_candidate(0, 0.5, 0.97, params={nasty: nasty}))
    figures = study_figures(front, chosen=front.best[0], layers=[row], sensitivities=[table])
    for figure in figures:
        for narrow in (False, True):
            text = figure.draw(narrow=narrow).to_json()
            assert "<img" not in text.replace("\\u003c", "<")
