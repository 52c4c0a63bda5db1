"""The dashboard in a browser: what this package adds to it shows what the database has, and can be read."""

from __future__ import annotations

import pytest
from optuna.trial import TrialState

pytestmark = pytest.mark.slow

FIGURES = "[id^='user-defined-plot:']"
FRONT = "[id='user-defined-plot:00-front']"
PARETO = "#graph-pareto-front"


@pytest.fixture(scope="module")
def study(synthetic_study, tmp_path_factory):
    return synthetic_study(tmp_path_factory.mktemp("dashboard"), trials=20, unfinished=True)


@pytest.fixture(scope="module")
def server(study, serving):
    with serving(study, read_only=True) as server:
        yield server


@pytest.fixture(scope="module")
def opened(server, visit):
    """The first page of the study, with all its figures drawn."""
    # The server comes first, and so ends last: pages ask it for news until they are closed.
    return visit(server.url).wait_for_figures(FIGURES)


@pytest.fixture
def stored(study):
    """The complete trials of the database by number."""
    trials = study.optuna_study.get_trials(states=[TrialState.COMPLETE])
    return {trial.number: trial for trial in trials}


def is_feasible(trial):
    return max(trial.constraints.values()) <= 0


def test_the_front_has_the_points_of_the_database(opened, stored):
    assert opened.faults == []
    shown = {
        int(number): (pytest.approx(y / 100, rel=1e-12), x, trace["name"] != "trial outside the band")
        for trace in opened.figure(FRONT)
        if trace["xaxis"] == "x2" and trace["text"] is not None
        for number, x, y in zip(trace["text"], trace["x"], trace["y"], strict=True)
    }
    assert {number: (*trial.values, is_feasible(trial)) for number, trial in stored.items()} == shown


def test_hovering_over_a_point_tells_its_trial(opened, study):
    best = study.front().choose()
    said = opened.hover(FRONT, x=best.mac_ratio, y=100 * best.accuracy)
    assert said[0] == f"trial {best.number}, on the front"
    assert f"mac_ratio: {best.mac_ratio:.4f}" in said
    opened.picture("dashboard-hover", whole=False)


def test_infeasible_trials_look_infeasible(opened, stored):
    traces = {trace["name"]: trace for trace in opened.figure(FRONT)}
    assert traces["trial outside the band"]["symbol"] != traces["trial in the band"]["symbol"]
    # And in the dashboard's own figure they are a trace of their own, in one pale colour.
    (pale,) = (trace for trace in opened.figure(PARETO) if trace["colour"] == "#cccccc")
    missed = [trial for trial in stored.values() if not is_feasible(trial)]
    assert len(missed) > 0
    assert sorted(zip(pale["x"], pale["y"], strict=True)) == sorted(tuple(trial.values) for trial in missed)


def test_our_figures_can_be_read_in_light_and_dark(opened):
    for scheme in ("dark", "light"):
        opened.look(scheme=scheme, width=1200)
        assert opened.overflow() == 0
        # One grey for both grounds cannot reach the 4.5 that texts should have.
        assert opened.hard_to_read(4.2, FIGURES) == set()
        opened.picture(f"dashboard-{scheme}")


def test_the_note_says_what_a_trial_is(server, visit, stored):
    missed = next(number for number, trial in stored.items() if not is_feasible(trial))
    for scheme in ("light", "dark"):
        page = visit(f"{server.url}/trials?numbers={missed}", scheme=scheme).page
        note = page.get_by_text("outside the band: it does not meet the target")
        note.wait_for()
        # HTML of a reason or of an attribute's name is text here, and did nothing.
        assert page.get_by_text("<script>alert(1)</script>").count() > 0
        assert page.title() != "hacked"
    assert page.locator("img[src='x']").count() == 0


def test_every_page_loads(server, visit):
    root = server.url.partition("/studies")[0]
    opened = visit(root)
    opened.page.get_by_text("synthetic").first.wait_for()
    for page, words in (
        ("/analytics", "Hyperparameter Relationships"),
        ("/smartSelection", "Download CSV File"),
        ("/note", "Most accurate in the band"),
    ):
        opened.go(server.url + page)
        opened.page.get_by_text(words).first.wait_for()
        opened.picture(f"dashboard-{page[1:]}", whole=False)
    assert opened.faults == []


def test_five_hundred_trials_stay_usable(visit, big_study, serving, slowness):
    with serving(big_study, read_only=True) as server:
        opened = visit(server.url).wait_for_figures(FIGURES)
        busy = {"figures": opened.busy_seconds()}
        best = big_study.front().choose()
        assert opened.hover(FRONT, x=best.mac_ratio, y=100 * best.accuracy)[0].startswith("trial ")
        opened.picture("dashboard-500")
        opened.go(f"{server.url}/trials").page.get_by_text("500 Trials").wait_for()
        opened.page.get_by_text("Trial 0 is complete.").wait_for()
        busy["trials"] = opened.busy_seconds()
        opened.picture("dashboard-500-trials", whole=False)
        # It asks for news until it is left.
        opened.go("about:blank")
        print("processor time, s:", busy)
        assert busy["figures"] < 6 * slowness
        assert busy["trials"] < 3 * slowness
