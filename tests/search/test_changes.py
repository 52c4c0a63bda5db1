"""What has changed since a study was made: refused, accepted on purpose, and remembered."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console
from torch.utils.data import DataLoader

from compress_search.exceptions import StudyMismatchError
from compress_search.progress import Progress
from compress_search.recipe import FineTune, Recipe
from compress_search.results import Reference
from compress_search.search import compression_study, study
from compress_search.search.changes import Change
from compress_search.search.history import RECIPE, STAGES
from compress_search.search.identity import Asked, Identity, agree, current_versions, load_identity
from compress_search.search.study import create_study, load_study
from compress_search.search.variables import Range
from compress_search.workspace import Workspace

REAL = current_versions()
QUICK = {"samples": 16, "fine_tune": FineTune(epochs=1), "tolerance": 0.2, "selection": "uniform"}


@pytest.fixture
def create(tiny_task, tmp_path):
    """Create a study whose database is not in its workspace, or continue it."""

    def make(task=None, **changes):
        storage = f"sqlite:///{tmp_path / 'study.db'}"
        options = QUICK | {"target": 0.5, "workspace": tmp_path / "runs", "storage": storage} | changes
        return create_study("first", task or tiny_task(), **options)

    return make


@pytest.fixture
def load(tiny_task, tmp_path):
    def make(**options):
        options = {"workspace": tmp_path / "runs", "storage": f"sqlite:///{tmp_path / 'study.db'}"} | options
        return load_study("first", tiny_task(), **options)

    return make


@pytest.fixture
def stored(new_study, make_settings):
    """Make a study of a task that nobody has, and what asks for just that."""

    def make(versions=REAL):
        study, task, settings = new_study(), {"name": "none", "train": "0a1b"}, make_settings()
        Identity(task, settings, Reference(0.9, 1000, 100), versions).save(study)
        return study, Asked(task=task, settings=settings)

    return make


@pytest.fixture
def with_versions(monkeypatch):
    """Let this process have other versions of packages."""

    def make(**versions):
        for module in (study, compression_study):
            monkeypatch.setattr(module, "current_versions", lambda: REAL | versions)

    return make


def optimize(study, n_trials):
    study.optimize(n_trials, progress=Progress(Console(file=io.StringIO())))
    return study


def changes_of(study):
    return load_identity(study.optuna_study).changes


def stages_of(study, number):
    return [stage["key"] for stage in study.optuna_study.trials[number].user_attrs[STAGES]]


def test_another_version_is_refused_to_who_wants_to_work(create, load, with_versions):
    assert load_identity(create().optuna_study).versions == REAL
    assert REAL.keys() == {"compress-search", "optuna", "torch", "torch-pruning", "numpy", "scipy"}
    with_versions(torch="1.0", numpy="0.9")
    # Whoever only looks may do so.
    looking = load()
    for work in (create, lambda: looking.optimize(1), looking.finalize):
        with pytest.raises(StudyMismatchError) as caught:
            work()
        message = str(caught.value)
        for package, version in (("torch", "1.0"), ("numpy", "0.9")):
            assert f"  - versions.{package}: stored '{REAL[package]}', asked '{version}'\n" in message
        assert message.count("  - ") == 2
        assert "--accept-changed (of run, resume, worker and finalize)" in message
        assert "accept_changed=True in Python" in message
    assert looking.optuna_study.trials == [] and "n_trials" not in looking.optuna_study.user_attrs


def test_a_version_that_was_accepted_is_noted_shown_and_asked_for_no_more(
    create, load, with_versions, caplog
):
    first = stages_of(optimize(create(), 1), 0)
    with_versions(torch="1.0")
    accepted = load(accept_changed=True)
    change = Change("versions.torch", REAL["torch"], "1.0", 1)
    assert changes_of(accepted) == (change,)
    course = f"{REAL['torch']} before trial 1, 1.0 from it on"
    assert f"versions.torch: {course}" in caplog.text
    # A stage is known by what was asked for, not by who computed it.
    (finalist,) = load().finalize(1, 1, progress=Progress(Console(file=io.StringIO())))
    assert stages_of(accepted, finalist.number)[:-1] == first
    assert [stage.reused for stage in finalist.stages] == [True] * len(first) + [False]
    create()
    assert changes_of(accepted) == (change,)
    assert f"Changed: versions.torch: {course}." in str(accepted.status())
    page = accepted.report().page.read_text(encoding="utf-8")
    assert "<tr><td>changed: versions.torch</td>" in page and course in page
    with_versions()
    with pytest.raises(StudyMismatchError, match=f"stored '1.0', asked '{REAL['torch']}'"):
        load().optimize(2)


def test_the_label_of_a_build_is_no_other_version(stored):
    study, asked = stored(versions={"torch": "2.15.0+cpu"})
    assert agree(study, replace(asked, versions={"torch": "2.15.0+cu128"})).changes == ()
    with pytest.raises(StudyMismatchError, match="asked '2.15.1"):
        agree(study, replace(asked, versions={"torch": "2.15.1+cpu"}))


def test_what_an_older_study_does_not_say_is_taken_as_it_is(stored, tmp_path):
    study, asked = stored(versions={"torch": REAL["torch"]})
    place = Workspace(tmp_path / "runs")
    agree(study, replace(asked, versions=REAL, workspace=place))
    identity = load_identity(study)
    assert identity.versions == REAL and identity.changes == ()
    assert list(identity.workspaces) == [place.token]
    old = {name: value for name, value in study.user_attrs["compress_search"].items() if name != "changes"}
    study.set_user_attr("compress_search", old)
    assert load_identity(study) == identity


def test_nothing_that_other_data_made_is_reused(create, tiny_task, load):
    before = optimize(create(), 1)
    data = tiny_task().train.dataset
    other = tiny_task(train=DataLoader(data, batch_size=8))
    with pytest.raises(StudyMismatchError, match="  - task.train: stored '"):
        create(other)
    accepted = optimize(create(other, accept_changed=True), 2)
    fields = [(change.field, change.from_trial) for change in changes_of(accepted)]
    assert fields == [("task.train", 1), ("task.calibration", 1)]
    assert set(stages_of(accepted, 0)).isdisjoint(stages_of(accepted, 1))
    assert stages_of(accepted, 0) == [stage.key for stage in before.candidates()[0].stages]
    assert not any(stage["reused"] for stage in accepted.optuna_study.trials[1].user_attrs[STAGES])
    with pytest.raises(StudyMismatchError, match="task.train"):
        load()


def test_the_original_is_measured_anew_with_other_weights(create, tiny_task, tiny_net):
    before = create()
    with pytest.raises(StudyMismatchError, match="  - task.model"):
        create(tiny_task(model=tiny_net(seed=1)))
    accepted = create(tiny_task(model=tiny_net(seed=1)), accept_changed=True)
    assert accepted.reference.accuracy != before.reference.accuracy
    assert [change.field for change in changes_of(accepted)] == ["task.model", "reference.accuracy"]


def test_a_network_of_another_size_is_never_accepted(create, tiny_task, tiny_net):
    create()
    for accept in (False, True):
        with pytest.raises(StudyMismatchError, match="the network is of another size") as caught:
            create(tiny_task(model=tiny_net(width=5)), accept_changed=accept)
        assert "reference.macs and reference.params cannot be accepted" in str(caught.value)
        assert "--accept-changed" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": 0.4}, "target cannot be accepted: the finished trials are feasible or not by it"),
        ({"target": (0.4, 0.6)}, "target cannot be accepted"),
        ({"tolerance": 0.3, "seed": 1}, "tolerance cannot be accepted"),
        ({"methods": ("channel_pruning",)}, "methods cannot be accepted: it is part of the search space"),
        ({"variables": {"fine_tune.lr": Range(0.1, 1.0)}}, "variables.fine_tune.lr cannot be accepted"),
        ({"step": 0.1}, "step cannot be accepted"),
        (
            {"sampler": "grid", "grid": {"c_ssvd": [0.8]}},
            r"sampler cannot be accepted: a grid's trials (.|\n)*grid.c_ssvd cannot",
        ),
    ],
)
def test_what_trials_are_compared_by_is_never_accepted(stored, make_settings, changes, said):
    study, asked = stored()
    for accept in (False, True):
        with pytest.raises(StudyMismatchError, match=said) as caught:
            agree(study, replace(asked, settings=make_settings(**changes)), accept=accept)
        assert "--accept-changed" not in str(caught.value)
    assert agree(study, asked).changes == ()


def test_all_that_makes_a_recipe_is_accepted(stored, make_settings):
    study, asked = stored()
    study.enqueue_trial({})
    study.add_trial(create_trial(state=TrialState.COMPLETE, values=(0.9, 0.5)))
    changes = {"sampler": "random", "seed": 1, "samples": 8, "keep_channels": {"0": (1,)}, "round_to": 2}
    settings = make_settings(**changes)
    noted = agree(study, replace(asked, settings=settings), accept=True)
    assert noted == load_identity(study) and noted.settings == settings
    # The trial that waits is the first to have them.
    assert {change.from_trial for change in noted.changes} == {0}
    assert {change.field for change in noted.changes} == {
        "keep_channels.0" if name == "keep_channels" else name for name in changes
    }
    assert agree(study, replace(asked, settings=settings)) == noted


def test_a_recipe_that_was_accepted_holds_from_the_next_trial_on(create):
    optimize(create(), 1)
    with pytest.raises(StudyMismatchError, match="  - fine_tune.epochs: stored 1, asked 2"):
        create(fine_tune=FineTune(epochs=2))
    study = optimize(create(fine_tune=FineTune(epochs=2), accept_changed=True), 2)
    assert changes_of(study) == (Change("fine_tune.epochs", 1, 2, 1),)
    recipes = [Recipe.from_dict(trial.user_attrs[RECIPE]) for trial in study.optuna_study.trials[:2]]
    epochs = [{stage.epochs for stage in recipe.stages if stage.name == "fine_tune"} for recipe in recipes]
    assert epochs == [{1}, {2}]


def test_another_workspace_is_refused_before_anything_is_done(create, load, tmp_path):
    study = optimize(create(), 1)
    stages = sorted(study.workspace.stages.iterdir())
    elsewhere = load(workspace=tmp_path / "other")
    for work in (lambda: elsewhere.optimize(2), lambda: create(workspace=tmp_path / "other")):
        with pytest.raises(StudyMismatchError) as caught:
            work()
        message = str(caught.value)
        assert f"  - workspace: stored '{tmp_path / 'runs'} on " in message
        assert f"(token {study.workspace.token})', asked '{tmp_path / 'other'} on " in message
        assert "mount it here" in message and "--accept-changed" in message
    assert len(elsewhere.optuna_study.trials) == len(study.optuna_study.trials)
    assert sorted(study.workspace.stages.iterdir()) == stages
    assert elsewhere.workspace.token is None
    # To be looked at it needs no workspace.
    assert [candidate.accuracy for candidate in elsewhere.front()] == [c.accuracy for c in study.front()]


def test_a_workspace_is_known_by_its_token_and_a_copy_without_it_by_being_accepted(stored, tmp_path):
    study, asked = stored()
    agree(study, replace(asked, workspace=Workspace(tmp_path / "runs")))
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved, copy = Workspace(tmp_path / "moved"), Workspace(tmp_path / "copy")
    assert agree(study, replace(asked, workspace=moved)).changes == ()
    with pytest.raises(StudyMismatchError, match="token missing"):
        agree(study, replace(asked, workspace=copy))
    (change,) = agree(study, replace(asked, workspace=copy), accept=True).changes
    assert change.field == "workspace" and moved.token in change.before and "copy" in change.after
    assert moved.token != copy.token
    # Both are the study's from now on.
    for place in (moved, copy):
        assert agree(study, replace(asked, workspace=place)).changes == (change,)


def test_processes_that_accept_at_the_same_time_note_it_once(stored, new_study):
    _, asked = stored()
    studies = [new_study() for _ in range(4)]
    barrier = threading.Barrier(4)

    def accept(one):
        barrier.wait()
        return agree(one, replace(asked, versions=REAL | {"torch": "1.0"}), accept=True)

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(accept, studies))
    assert len({end.changes for end in ends}) == 1
    assert [change.field for change in ends[0].changes] == ["versions.torch"]
