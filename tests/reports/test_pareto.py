from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from compress_search.reports.figure_look import DARK
from compress_search.reports.pareto import ParetoData, pareto_data
from compress_search.reports.pareto_interactive import draw_interactive
from compress_search.reports.pareto_look import KINDS
from compress_search.reports.pareto_picture import draw_static
from compress_search.results import Candidate, ParetoFront

Make = Callable[..., Candidate]
MakeFront = Callable[..., ParetoFront]


@pytest.fixture
def data(make_candidate: Make, make_front: MakeFront) -> ParetoData:
    candidates = [
        make_candidate(0, 0.495, 0.970, reused=2),
        make_candidate(1, 0.500, 0.975),
        make_candidate(2, 0.505, 0.960),
        make_candidate(3, 0.700, 0.979),
        make_candidate(4, 0.5, 0.9, state="failed", reason="it broke"),
    ]
    return pareto_data(make_front(*candidates), chosen=candidates[1])


def _markers(data: ParetoData) -> dict[str, list[Any]]:
    """The marker traces of both panels by their name in the legend."""
    traces: dict[str, list[Any]] = {}
    for trace in draw_interactive(data).data:
        if "markers" in trace.mode:
            traces.setdefault(trace.name, []).append(trace)
    return traces


def test_only_complete_trials_are_points(data: ParetoData) -> None:
    assert [(p.number, p.status) for p in data.points] == [
        (0, "on the front"),
        (1, "on the front"),
        (2, "in the band"),
        (3, "outside the band"),
    ]


def test_numbers_that_are_not_finite_are_no_points(make_candidate: Make, make_front: MakeFront) -> None:
    odd = make_candidate(0, 0.5, math.nan, feasible=False)
    good = make_candidate(1, 0.5, 0.9)
    data = pareto_data(make_front(odd, good))
    assert [p.number for p in data.points] == [1]
    assert data.scale.unit == " %"


def test_the_front_is_what_nothing_dominates(make_candidate: Make, make_front: MakeFront) -> None:
    draw = random.Random(0)
    candidates = [make_candidate(n, draw.uniform(0.48, 0.52), draw.uniform(0.9, 0.98)) for n in range(40)]
    feasible = [c for c in candidates if c.feasible]
    undominated = {
        a.number
        for a in feasible
        if not any(b is not a and b.mac_ratio <= a.mac_ratio and b.accuracy >= a.accuracy for b in feasible)
    }
    data = pareto_data(make_front(*candidates))
    assert {p.number for p in data.points if p.on_front} == undominated
    assert 0 < len(undominated) < len(feasible)


def test_the_step_line_is_the_best_accuracy_within_each_budget(data: ParetoData) -> None:
    assert data.steps == ((0.495, 0.970), (0.500, 0.975), (0.51, 0.975))


def test_facts_say_everything_about_a_trial(data: ParetoData) -> None:
    assert data.points[0].facts == (
        ("c_ssvd", "0.75"),
        ("c_cp", "0.66"),
        ("mac_ratio", "0.4950"),
        ("accuracy", "97.00 %"),
        ("drop", "+1.00 points"),
        ("MACs", "495,000"),
        ("parameters", "24,750"),
        ("after spatial_svd", "94.00 % at 0.4950"),
        ("after fine_tune", "95.00 % at 0.4950"),
        ("after channel_pruning", "96.00 % at 0.4950"),
        ("after fine_tune", "97.00 % at 0.4950"),
        ("time", "42.5 s"),
        ("reused stages", "2 of 4"),
    )


def test_the_whole_view_holds_every_point_and_the_original(data: ParetoData) -> None:
    (left, right), (bottom, top) = data.whole.x, data.whole.y
    for x, y in [(1.0, data.original_accuracy), *((p.mac_ratio, p.accuracy) for p in data.points)]:
        assert left < x < right
        assert bottom < y < top


def test_the_enlarged_view_is_not_flattened_by_one_failure(
    make_candidate: Make, make_front: MakeFront
) -> None:
    good = [make_candidate(n, 0.5, 0.97 + 0.001 * n) for n in range(8)]
    failure = make_candidate(8, 0.5, 0.10)
    with_failure = pareto_data(make_front(*good, failure)).zoomed
    assert with_failure.y == pareto_data(make_front(*good)).zoomed.y
    assert with_failure.below == 1


def test_the_enlarged_view_keeps_the_front_however_low_it_lies(
    make_candidate: Make, make_front: MakeFront
) -> None:
    cheap = make_candidate(8, 0.49, 0.10)
    data = pareto_data(make_front(*(make_candidate(n, 0.5, 0.97) for n in range(8)), cheap))
    assert data.front[0].number == 8
    assert data.zoomed.y[0] < 0.10


def test_studies_without_an_answer_are_drawn_too(
    make_candidate: Make, make_front: MakeFront, tmp_path: Path
) -> None:
    fronts = {
        "no complete trial": [
            make_front(),
            make_front(make_candidate(0, 0.5, 0.9, state="failed", reason="it broke")),
        ],
        "no complete trial in the band": [make_front(make_candidate(0, 0.7, 0.9))],
    }
    for remark, several in fronts.items():
        for front in several:
            data = pareto_data(front)
            assert data.steps == ()
            notes = [note.text for note in draw_interactive(data).layout.annotations]
            assert remark in notes
            draw_static(data, tmp_path / "front.png")
            assert imread(tmp_path / "front.png").size > 0


def test_one_candidate_is_enough(make_candidate: Make, make_front: MakeFront, tmp_path: Path) -> None:
    data = pareto_data(make_front(make_candidate(0, 0.5, 0.97)))
    assert data.steps == ((0.5, 0.97), (0.51, 0.97))
    assert "trial on the front" in _markers(data)
    draw_static(data, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 10_000


def test_both_panels_show_the_points_of_the_data(data: ParetoData) -> None:
    markers = _markers(data)
    for kind in KINDS:
        wanted = [(p.mac_ratio, 100 * p.accuracy) for p in kind.points_of(data)]
        assert wanted
        panels = markers[f"trial {kind.name}"]
        assert [trace.xaxis for trace in panels] == ["x", "x2"]
        for trace in panels:
            assert list(zip(trace.x, trace.y, strict=True)) == wanted
    assert (markers["original model"][0].x, markers["original model"][0].y) == ((1.0,), (98.0,))
    assert markers["chosen: trial 1"][0].x == (0.5,)


def test_infeasible_trials_look_different_and_say_so(data: ParetoData) -> None:
    markers = _markers(data)
    symbols = {name: traces[0].marker.symbol for name, traces in markers.items() if "trial " in name}
    assert symbols["trial outside the band"] == "x-thin-open"
    assert len(set(symbols.values())) == len(symbols)
    assert "outside the band" in markers["trial outside the band"][0].hovertext[0]


def test_each_kind_stands_in_the_legend_once(data: ParetoData) -> None:
    figure = draw_interactive(data)
    names = [item.name for item in (*figure.data, *figure.layout.shapes) if item.showlegend]
    assert len(names) == len(set(names))
    assert {"band 0.49 to 0.51", "target 0.5", "accuracy of the original"} < set(names)


def test_hover_shows_all_facts_and_escapes_them(make_candidate: Make, make_front: MakeFront) -> None:
    data = pareto_data(make_front(make_candidate(7, 0.5, 0.97, params={"<b>c</b>": 0.5})))
    text = _markers(data)["trial on the front"][0].hovertext[0]
    assert text.startswith("<b>trial 7, on the front</b><br>&lt;b&gt;c&lt;/b&gt;: 0.5<br>")
    for name, value in data.points[0].facts[1:]:
        assert f"{name}: {value}" in text


def test_axes_are_named_with_their_units(data: ParetoData) -> None:
    layout = draw_interactive(data).layout
    assert layout.yaxis.title.text == "validation accuracy (%)"
    assert "MACs kept / MACs of the original" in layout.xaxis.title.text


def test_a_narrow_or_dark_page_shows_the_same_data(data: ParetoData) -> None:
    usual, other = draw_interactive(data), draw_interactive(data, narrow=True, theme=DARK)
    assert usual.data == other.data
    assert usual.layout.font.color != other.layout.font.color
    assert other.layout.xaxis.domain == other.layout.xaxis2.domain == (0, 1)
    assert usual.layout.xaxis.domain != usual.layout.xaxis2.domain


def test_the_picture_shows_every_kind_in_its_colour(data: ParetoData, tmp_path: Path) -> None:
    draw_static(data, tmp_path / "front.png")
    pixels = np.unique((imread(tmp_path / "front.png")[..., :3] * 255).round().reshape(-1, 3), axis=0)
    for kind in KINDS:
        colour = [int(kind.colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == colour).all(axis=1).any(), kind.name
    assert [path.name for path in tmp_path.iterdir()] == ["front.png"]
