"""Every stage is known by the trials that use it, in whatever database they are."""

from __future__ import annotations

import io
import json

import optuna
import pytest
from rich.console import Console

from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.search.stage_uses import remember_database, stage_uses
from compress_search.search.storage import open_storage, quiet_optuna
from compress_search.search.study import create_study
from compress_search.workspace import Workspace


@pytest.fixture
def create(tiny_task, tmp_path):
    """Run a study of some trials in the workspace ``runs``."""

    def make(name="first", n_trials=0, **changes):
        options = {"samples": 16, "fine_tune": FineTune(epochs=1), "tolerance": 0.1, "target": 0.5}
        study = create_study(name, tiny_task(), workspace=tmp_path / "runs", **options | changes)
        if n_trials:
            study.optimize(n_trials, progress=Progress(Console(file=io.StringIO())))
        return study

    return make


def stored(study):
    return {path.name for path in study.workspace.stages.iterdir()}


def test_every_stage_has_its_users_and_the_original_is_the_studys(create):
    study = create(n_trials=3)
    uses = stage_uses(study.workspace)
    assert set(uses.by_key) == stored(study)
    wanted = {
        (key, use.trial) for key, users in uses.by_key.items() for use in users if use.trial is not None
    }
    assert wanted == {(s.key, c.number) for c in study.candidates() for s in c.stages}
    (original,) = [users for users in uses.by_key.values() if users[0].trial is None]
    assert [(use.study, use.state, use.needed) for use in original] == [("first", "original", True)]
    assert uses.gaps == ()


def test_the_front_and_what_is_not_finished_are_needed(create):
    study = create(n_trials=3)

    def needed():
        found = stage_uses(study.workspace).by_key.values()
        return {use.trial for users in found for use in users if use.needed and use.trial is not None}

    front = {candidate.number for candidate in study.front()}
    beside = {candidate.number for candidate in study.candidates()} - front
    assert front and beside
    assert needed() == front
    again = min(beside)
    study.optuna_study.enqueue_trial({}, user_attrs={"retry_of": again})
    assert needed() == front | {again}
    begun = study.optuna_study.trials[again].datetime_start.timestamp()
    assert stage_uses(study.workspace).unfinished_since == begun - 86_400


def test_without_a_front_every_trial_is_needed(create):
    study = create(n_trials=1, tolerance=1e-6)
    assert len(study.front()) == 0
    uses = stage_uses(study.workspace)
    assert len(uses.by_key) > 1 and all(use.needed for users in uses.by_key.values() for use in users)


def test_studies_that_share_a_stage_are_both_its_users(create):
    create("first", n_trials=1)
    second = create("second", n_trials=1)
    users = stage_uses(second.workspace).by_key
    assert all([use.study for use in found] == ["first", "second"] for found in users.values())


def test_a_study_whose_database_is_elsewhere_is_found(create, tmp_path):
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    study = create(n_trials=1, storage=url)
    uses = stage_uses(study.workspace)
    assert set(uses.by_key) == stored(study) and uses.gaps == ()
    study.storage.engine.dispose()
    (tmp_path / "elsewhere.db").rename(tmp_path / "moved.db")
    (cannot, unknown, none) = stage_uses(study.workspace).gaps
    assert "database of the study 'first' cannot be read" in cannot and "elsewhere.db" in cannot
    assert "'first' is in no database" in unknown
    assert "There is no database of studies" in none
    found = stage_uses(study.workspace, f"sqlite:///{tmp_path / 'moved.db'}")
    assert set(found.by_key) == stored(study)
    # Its folder still names the place that is gone: who reads only this list is to know of it.
    assert len(found.gaps) == 1


def test_the_workspaces_own_database_is_not_noted_and_a_password_neither(tmp_path):
    workspace = Workspace(tmp_path / "runs").prepare()
    remember_database(workspace, "own", f"sqlite:///{workspace.database}")
    assert not workspace.study_folder("own").exists()
    remember_database(workspace, "other", "postgresql+psycopg://me:secret@host/db")
    text = (workspace.study_folder("other") / "database.json").read_text()
    assert "secret" not in text and json.loads(text)["storage"].startswith("postgresql+psycopg://me@")


def test_a_folder_of_an_unknown_study_is_a_gap_and_other_folders_are_not(create):
    study = create()
    # A study could be called "teacher" once, as a folder of the workspace's own.
    for name, file in (("deleted", "study.log"), ("notes", "todo.txt"), ("teacher", "config.yaml")):
        (study.workspace.root / name).mkdir()
        (study.workspace.root / name / file).write_text("")
    gaps = stage_uses(study.workspace).gaps
    assert len(gaps) == 2
    for name, gap in zip(("deleted", "teacher"), gaps, strict=True):
        assert f"The study {name!r} is in no database that was looked at" in gap


def test_a_study_that_another_program_made_has_no_stages(create):
    study = create()
    with quiet_optuna():
        foreign = optuna.create_study(
            study_name="foreign", storage=open_storage(None, study.workspace), direction="minimize"
        )
    foreign.add_trial(optuna.create_trial(value=1.0, user_attrs={"stages": "many"}))
    assert {use.study for users in stage_uses(study.workspace).by_key.values() for use in users} == {"first"}
    assert stage_uses(study.workspace).gaps == ()
    foreign._storage._backend.engine.dispose()


def test_a_study_of_a_version_that_cannot_be_read_is_a_gap(create):
    study = create()
    stored = study.optuna_study.user_attrs["compress_search"]
    study.optuna_study.set_user_attr("compress_search", stored | {"settings": {}})
    (gap,) = stage_uses(study.workspace).gaps
    assert "whose settings this version cannot read" in gap
