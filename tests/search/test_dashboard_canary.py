"""What this package relies on in the dashboard: when that changes, look at the search/dashboard files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import optuna_dashboard
import optuna_dashboard._app as dashboard_app
import pytest
from optuna.trial import FrozenTrial, create_trial
from optuna_dashboard._note import get_note_from_system_attrs
from optuna_dashboard._serializer import serialize_frozen_trial, serialize_study_detail

STUDY = {
    *("name", "directions", "user_attrs", "artifacts", "trials", "best_trials", "intersection_search_space"),
    *("union_search_space", "union_user_attrs", "has_intermediate_values", "note", "is_preferential"),
    *("feedback_component_type", "plotly_graph_objects"),
}
TRIAL = {
    *("trial_id", "study_id", "number", "state", "params", "fixed_params", "user_attrs", "note"),
    *("artifacts", "constraints", "intermediate_values", "values", "datetime_start", "datetime_complete"),
}


@pytest.fixture
def study() -> optuna.Study:
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.add_trial(create_trial(values=[0.9, 0.5], constraints={"mac_ratio": 0.1}))
    return study


def test_it_still_does_not_see_constraints_and_reads_the_list(study: optuna.Study) -> None:
    def constraints(trial: FrozenTrial) -> Any:
        return serialize_frozen_trial(0, trial, {})["constraints"]

    trial = study.get_trials()[0]
    assert constraints(trial) == [], "It reads them by itself now: the view need not add the list."
    trial.system_attrs = {"constraints": [0.1]}
    assert constraints(trial) == [0.1]


def test_its_front_still_has_infeasible_trials(study: optuna.Study) -> None:
    from compress_search.search.dashboard_view import _best_of_all

    found = _best_of_all(study.get_trials(), study.directions)
    assert len(found) == 1, "It leaves them out by itself now: that function need not be replaced."


def test_what_is_sent_to_the_page_has_the_same_names(study: optuna.Study) -> None:
    frozen = study._storage.get_all_studies()[0]
    details = serialize_study_detail(frozen, [], study.get_trials(), [], [], [], False, {"a": "b"}, [])
    assert set(details) == STUDY
    assert set(details["trials"][0]) == TRIAL
    assert details["plotly_graph_objects"] == [{"id": "a", "graph_object": "b"}]


def test_notes_plots_and_files_are_read_from_the_same_attributes(study: optuna.Study) -> None:
    note = {"dashboard:7:note_ver": 3, "dashboard:7:note_str:0": "x" * 5000, "dashboard:note_ver": 1}
    assert get_note_from_system_attrs(note, 7) == {"version": 3, "body": "x" * 5000}
    assert get_note_from_system_attrs(note | {"dashboard:note_str:0": "y"}, None)["body"] == "y"
    plots = {"dashboard:plot_data:01-a:0": "{" + " " * 5000 + "}"}
    assert set(dashboard_app.get_plotly_graph_objects(plots)) == {"01-a"}
    trial = study.get_trials()[0]
    trial.system_attrs = {"artifacts:1f-a1": json.dumps({"artifact_id": "1f-a1"})}
    assert serialize_frozen_trial(0, trial, {})["artifacts"] == [{"artifact_id": "1f-a1"}]


def test_the_page_still_looks_at_these() -> None:
    bundle = Path(optuna_dashboard.__file__).with_name("public") / "bundle.js"
    script = bundle.read_text(encoding="utf-8")
    for piece in (
        ".constraints.every(",
        "plotly_graph_objects.map(",
        "JSON.parse(e.graph_object)",
        "note:a.note",
        "metric_names:a.objective_names",
        # HTML in notes is shown as text, unless the server says that it may be unsafe.
        "allow_unsafe)&&e})(),n=[];return t&&n.push(",
    ):
        assert piece in script, f"{piece} is gone from {bundle.name} {optuna_dashboard.__version__}"
