"""Studies on a tiny network: created, continued, refused, and asked for their answer."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import io
import json
import logging
import re
from functools import partial

import optuna
import pytest
import torch
from optuna.study import StudyDirection
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress_search.exceptions import (
    ConfigError,
    DeviceError,
    EvaluationError,
    StudyError,
    StudyMismatchError,
    TaskError,
    WorkspaceError,
)
from compress_search.leases import Lease
from compress_search.profile import profile_model
from compress_search.progress import Progress
from compress_search.recipe import FineTune, Recipe
from compress_search.results import Reference
from compress_search.search.identity import DIRECTIONS
from compress_search.search.settings import SearchSettings
from compress_search.search.storage import open_storage, quiet_optuna
from compress_search.search.study import create_study, load_study
from compress_search.search.variables import Choice, Range
from compress_search.task import accuracy
from compress_search.worker_process import Worker
from compress_search.workspace import INTERNAL_NAMES, Workspace

QUICK = {"samples": 16, "fine_tune": FineTune(epochs=1), "tolerance": 0.1}


@pytest.fixture
def create(tiny_task, tmp_path):
    def make(name="first", task=None, **changes):
        options = QUICK | {"target": 0.5, "workspace": tmp_path} | changes
        return create_study(name, task or tiny_task(), **options)

    return make


def optimize(study, n_trials):
    study.optimize(n_trials, progress=Progress(Console(file=io.StringIO())))
    return study


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory):
    """One study of five trials, for the tests that only read."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(96, 1, 6, 6, generator=generator), torch.arange(96) % 3
    batches = [(images[i : i + 32], labels[i : i + 32]) for i in (0, 32, 64)]
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(6, 12, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(12 * 36, 3),
    )
    from compress_search.task import Task

    task = Task(
        model=net,
        example_input=images[:1],
        train=batches[:1],
        validation=batches[1:2],
        test=batches[2:],
        name="toy",
    )
    folder = tmp_path_factory.mktemp("work")
    study = optimize(create_study("toy", task, target=0.5, workspace=folder, **QUICK), 5)
    return study, task, folder


def test_the_spelt_out_settings_are_those_of_search_settings():
    spelt = inspect.signature(create_study).parameters
    for field in dataclasses.fields(SearchSettings):
        default = spelt[field.name].default
        if field.name in ("fine_tune", "keep_channels", "shares", "variables", "grid"):
            assert default is None and field.default_factory() == {"fine_tune": FineTune()}.get(
                field.name, {}
            )
        elif field.name == "target":
            assert default is inspect.Parameter.empty
        else:
            assert default == field.default


def test_a_study_goes_from_a_task_to_a_model(finished):
    study, task, folder = finished
    profile = profile_model(task.build_model(), task.example_input)
    assert study.reference == Reference(task.score(task.build_model()), profile.macs, profile.params)
    assert study.folder == folder / "toy" and study.task_name == "toy"
    candidates = study.candidates()
    assert [c.state for c in candidates] == ["complete"] * 5
    for candidate in candidates:
        model = candidate.load_model()
        assert task.score(model) == candidate.accuracy
        macs = profile_model(model, task.example_input).macs
        assert macs / study.reference.macs == candidate.mac_ratio
        assert candidate.feasible == (abs(candidate.mac_ratio - 0.5) / 0.5 <= 0.1)
        assert candidate.drop == study.reference.accuracy - candidate.accuracy
        assert set(candidate.params) == {"c_ssvd", "c_cp"}
    assert study.best() in study.front().best
    assert study.best(max_drop=1.0).mac_ratio == min(c.mac_ratio for c in candidates if c.feasible)


def test_the_optuna_study_is_set_up_as_any_other_tool_expects(finished):
    study, *_ = finished
    assert study.optuna_study.directions == [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    assert study.optuna_study.metric_names == ["accuracy", "mac_ratio"]
    assert [t.user_attrs.get("anchor") for t in study.optuna_study.trials] == [
        "spatial_svd only",
        "channel_pruning only",
        "equal ratios",
        "guidebook",
        None,
    ]
    assert all("mac_ratio" in trial.constraints for trial in study.optuna_study.trials)


def test_a_loaded_study_is_the_same_and_runs_nothing_more(finished, monkeypatch):
    study, task, folder = finished
    loaded = load_study("toy", task, workspace=folder)
    monkeypatch.setattr(type(task), "score", lambda *_: pytest.fail("evaluated"))
    optimize(loaded, 5)
    assert loaded.candidates() == study.candidates()
    assert loaded.settings == study.settings and loaded.reference == study.reference


def test_a_study_opened_without_its_task_can_be_looked_at_only(finished):
    study, task, folder = finished
    seen = load_study("toy", workspace=folder)
    assert seen.front() == study.front()
    assert "5 of 5 trials finished (5 complete)" in str(seen.status())
    original = task.build_model()
    assert task.score(seen.best().load_model(original)) == seen.best().accuracy
    with pytest.raises(StudyError, match=r'which optimize needs: load_study\("toy", task\)'):
        seen.optimize(6)
    untested = next(c for c in seen.candidates() if str(c.number) not in seen.optuna_study.user_attrs)
    with pytest.raises(StudyError, match="without its task"):
        load_study("toy", workspace=folder).test(dataclasses.replace(untested, number=99))


def test_what_the_task_cannot_be_trained_by_is_refused_before_anything_is_stored(create, tmp_path):
    with pytest.raises(TaskError, match="cannot be fine-tuned"):
        create(fine_tune=FineTune(epochs=1, options={"a": 1}))


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_checkpoints_have_to_be_some_time_apart(finished, seconds):
    study, *_ = finished
    with pytest.raises(StudyError, match="checkpoint_seconds is"):
        study.optimize(99, checkpoint_seconds=seconds)


def test_a_trial_that_is_stopped_in_its_fine_tuning_goes_on_from_its_checkpoint(
    create, tiny_task, tmp_path, caplog
):
    caplog.set_level("INFO", logger="compress_search")
    until_stop = []

    def evaluate(model, loader):
        if until_stop and until_stop.pop() == "stop":
            raise KeyboardInterrupt
        return accuracy(model, loader)

    def new(folder):
        settings = {"fine_tune": FineTune(epochs=4), "selection": "uniform", "workspace": tmp_path / folder}
        return create(task=tiny_task(evaluate=evaluate), **settings)

    undisturbed, study = optimize(new("undisturbed"), 2), new("stopped")
    until_stop += ["stop", *["go on"] * 4]
    with pytest.raises(KeyboardInterrupt):
        optimize(study, 2)
    assert "goes on from its checkpoint" not in caplog.text
    optimize(study, 2)
    assert "goes on from its checkpoint: epoch" in caplog.text
    found, wanted = (
        sorted(c.accuracy for c in s.candidates() if c.state == "complete") for s in (study, undisturbed)
    )
    assert found == wanted and len(found) == 2
    assert not list((study.workspace.root / "checkpoints").iterdir())
    trials = study.optuna_study.trials
    assert trials[0].user_attrs["reason"] == "interrupted: the search was stopped"
    assert len(trials[0].user_attrs["learning_curve"]) == 1 + 2


def test_the_status_adds_up(finished):
    study, *_ = finished
    status = study.status()
    stages = [stage for candidate in study.candidates() for stage in candidate.stages]
    assert sum(status.seconds_by_stage.values()) == pytest.approx(
        sum(s.seconds for s in stages if not s.reused)
    )
    assert set(status.seconds_by_stage) == {
        "spatial_svd",
        "fine_tune after spatial_svd",
        "channel_pruning",
        "fine_tune after channel_pruning",
    }
    assert status.reused_stages == sum(s.reused for s in stages)
    assert status.computed_stages == sum(not s.reused for s in stages)
    saved = sum(s.seconds for s in stages if s.reused)
    assert status.seconds_saved == pytest.approx(saved)
    assert status.share_saved == pytest.approx(saved / sum(s.seconds for s in stages))
    assert f"Reused: {status.reused_stages} of {len(stages)} stages, which saved " in str(status)
    assert f": {100 * status.share_saved:.0f} % of what computing all of them takes." in str(status)
    known = sum(s.teacher_seconds_saved for s in stages if not s.reused)
    assert status.teacher_seconds_saved == pytest.approx(known) and known > 0
    assert "What the original says of the training batches was known to later fine-tunings" in str(status)
    for kind in status.stages:
        assert re.search(rf"^{kind.name} +{kind.computed} .* {kind.reused} ", str(status), re.MULTILINE)
    assert status.best == study.best()
    assert f"trial {status.best.number} (c_ssvd " in str(status)


def test_the_test_data_are_used_once_each(finished, monkeypatch):
    study, task, folder = finished
    best = study.best()
    score = study.test(best)
    assert score.original == task.score(task.build_model(), task.test)
    assert score.candidate == task.score(best.load_model(), task.test)
    monkeypatch.setattr(type(task), "score", lambda *_: pytest.fail("evaluated"))
    assert study.test(best) == load_study("toy", workspace=folder).test(best) == score


def test_the_same_test_images_judge_the_original_and_every_candidate(create, tiny_task):
    """Also where the loader shuffles and drops the rest."""
    (images, labels), *_ = tiny_task().validation
    seen = []

    def judge(model, loader):
        seen.append([inputs.clone() for inputs, _ in loader])
        return accuracy(model, loader)

    shuffled = DataLoader(TensorDataset(images, labels), batch_size=12, shuffle=True, drop_last=True)
    study = optimize(create(task=tiny_task(test=shuffled, evaluate=judge)), 2)
    first, second = (c for c in study.candidates() if c.state == "complete")
    seen.clear()
    for candidate in (first, second):
        study.test(candidate)
    assert len(seen) == 3
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    torch.testing.assert_close(seen[0], seen[2], rtol=0, atol=0)


def test_other_test_data_or_another_way_to_judge_are_measured_anew(create, tiny_task, tmp_path):
    def half(model, loader):
        return 0.5

    (images, labels), *_ = tiny_task().validation
    one, other = [(images, labels)], [(images, labels.roll(1))]
    study = optimize(create(task=tiny_task(test=one)), 2)
    first, second = (c for c in study.candidates() if c.state == "complete")
    before = study.test(first)
    task = tiny_task(test=other)
    again = create(task=task)
    original = task.score(task.build_model(), other)
    assert original != before.original
    for candidate in (first, second):
        wanted = task.score(candidate.load_model(task.build_model()), other)
        assert dataclasses.astuple(again.test(candidate)) == (original, wanted)
    # Each is still known by what it was measured on, and without the task the last one counts.
    assert study.test(first) == before
    seen = load_study("first", workspace=tmp_path)
    assert seen.test(first) == again.test(first)
    judged = create(task=tiny_task(test=one, evaluate=half), accept_changed=True, name="judged")
    assert judged._test_key not in (study._test_key, again._test_key)


def test_scores_of_which_it_is_not_known_what_they_were_measured_on_are_measured_again(finished):
    study, _, folder = finished
    best = study.best()
    score = study.test(best)
    kept = study.optuna_study.user_attrs["test_scores"]
    old = {"original": 0.125, str(best.number): 0.25}
    study.optuna_study.set_user_attr("test_scores", old)
    with pytest.raises(StudyError, match="without its task"):
        load_study("toy", workspace=folder).test(best)
    assert study.test(best) == score
    study.optuna_study.set_user_attr("test_scores", kept)


def test_report_and_export_lie_in_the_studys_folder(finished):
    study, *_ = finished
    best = study.best()
    exported = study.export(best)
    assert exported.folder == study.folder / "export" / f"trial-{best.number}"
    files = study.report(best)
    assert files.page.parent == study.folder
    assert "toy" in files.page.read_text(encoding="utf-8")
    assert load_study("toy", workspace=study.workspace.root).report().table.is_file()


@pytest.mark.parametrize(
    ("changes", "field", "stored", "asked"),
    [
        ({"target": 0.4}, "target", "0.5", "0.4"),
        ({"tolerance": 0.05}, "tolerance", "0.1", "0.05"),
        (
            {"methods": ("channel_pruning",)},
            "methods",
            "['spatial_svd', 'channel_pruning']",
            "['channel_pruning']",
        ),
        ({"samples": 8}, "samples", "16", "8"),
        ({"fine_tune": FineTune(epochs=2)}, "fine_tune.epochs", "1", "2"),
        ({"step": 0.1}, "step", "0.05", "0.1"),
        ({"max_drop_after_ssvd": 0.5}, "max_drop_after_ssvd", "None", "0.5"),
        ({"sampler": "random"}, "sampler", "'tpe'", "'random'"),
        ({"seed": 1}, "seed", "0", "1"),
        ({"round_to": 2}, "round_to", "1", "2"),
        ({"ignore": ("0",)}, "ignore", "[]", "['0']"),
        ({"keep_channels": {"0": (1,)}}, "keep_channels.0", "'nothing'", "[1]"),
        (
            {"variables": {"fine_tune.lr": Range(0.1, 1.0)}},
            "variables.fine_tune.lr",
            "'nothing'",
            "{'low': 0.1, 'high': 1.0,",
        ),
        ({"per_layer_fine_tune": FineTune()}, "per_layer_fine_tune", "None", "{'epochs': 10,"),
    ],
)
def test_another_setting_is_refused_by_its_name(create, changes, field, stored, asked):
    create()
    with pytest.raises(StudyMismatchError) as caught:
        create(**changes)
    message = str(caught.value)
    assert f"  - {field}: stored {stored}, asked {asked}" in message
    assert message.count("  - ") == 1
    assert "ask for the stored values" in message and 'create_study("first-2"' in message


@pytest.mark.parametrize("load", [False, True])
def test_another_task_is_refused_by_what_differs(create, tiny_task, tiny_net, tmp_path, load):
    create()

    def evaluate(model, loader):
        return 0.5

    others = {
        "task.name": tiny_task(name="other"),
        "task.model": tiny_task(model=tiny_net(seed=1)),
        "task.validation": tiny_task(validation=tiny_task().train),
        "task.evaluate": tiny_task(evaluate=evaluate),
        "task.loss": tiny_task(loss=nn.CrossEntropyLoss(label_smoothing=0.1)),
    }
    for field, task in others.items():
        open_again = (
            partial(load_study, "first", task, workspace=tmp_path) if load else partial(create, task=task)
        )
        with pytest.raises(StudyMismatchError, match=f"  - {field}: stored '"):
            open_again()


def test_all_differences_come_at_once(create):
    create()
    with pytest.raises(StudyMismatchError) as caught:
        create(target=0.4, step=0.1, final_fine_tune=FineTune(epochs=2))
    assert "  - target:" in str(caught.value) and "  - step:" in str(caught.value)
    assert "  - final_fine_tune: stored None, asked {'epochs': 2," in str(caught.value)
    assert str(caught.value).count("  - ") == 3


def test_the_same_study_is_continued(create):
    first = optimize(create(), 1)
    again = optimize(create(), 2)
    assert len(again.candidates()) >= 2
    assert first.candidates()[0] == again.candidates()[0]


def test_training_after_each_layer_leaves_the_stages_of_a_trial_as_they_are(create):
    study = optimize(create(per_layer_fine_tune=FineTune(epochs=1), selection="uniform"), 3)
    complete = [candidate for candidate in study.candidates() if candidate.state == "complete"]
    assert {tuple(stage.name for stage in candidate.stages) for candidate in complete} == {
        ("spatial_svd", "fine_tune"),
        ("channel_pruning", "fine_tune"),
        ("spatial_svd", "fine_tune", "channel_pruning", "fine_tune"),
    }
    example = study.task.example_input
    for candidate in complete:
        assert profile_model(candidate.load_model(), example).macs == candidate.stages[-1].macs
    recipe = Recipe.from_dict(study.optuna_study.trials[0].user_attrs["recipe"])
    assert recipe.stages[0].per_layer_fine_tune == FineTune(epochs=1)
    keys = {stage.key for candidate in complete for stage in candidate.stages}
    # Beside them there is the original.
    assert len([*study.workspace.stages.iterdir()]) == len(keys) + 1
    assert study.report(complete[0]).page.is_file()


@pytest.mark.slow
def test_a_study_with_variables_goes_from_a_task_to_its_report(create, tmp_path):
    variables = {
        "fine_tune.lr": Range(1e-3, 1e-1, log=True),
        "fine_tune.epochs": Range(1, 2),
        "selection": Choice(("optimal", "uniform")),
    }
    study = optimize(create(variables=variables), 6)
    for trial in study.optuna_study.trials:
        assert set(trial.params) == {"c_ssvd", "c_cp", *variables}
        stages = Recipe.from_dict(trial.user_attrs["recipe"]).stages
        tuned = [stage for stage in stages if isinstance(stage, FineTune)]
        wanted = FineTune(epochs=trial.params["fine_tune.epochs"], lr=trial.params["fine_tune.lr"])
        assert tuned == [wanted] * len(tuned) != []
        chosen = {stage.selection for stage in stages if not isinstance(stage, FineTune)}
        assert chosen == {trial.params["selection"]}
    best = study.best()
    files = study.report(best)
    page = files.page.read_text(encoding="utf-8")
    assert f"{best.params['fine_tune.lr']:.4g}" in page and "variables.fine_tune.lr.low" in page
    rows = list(csv.DictReader(io.StringIO(files.table.read_text(encoding="utf-8"))))
    assert [row["param_selection"] for row in rows] == [c.params["selection"] for c in study.candidates()]
    assert f"selection {best.params['selection']}" in str(study.status())
    assert load_study("first", workspace=tmp_path).settings == study.settings
    exported = json.loads((study.export(best).folder / "candidate.json").read_text())
    assert exported["search_params"] == best.params


@pytest.mark.slow
def test_the_front_of_a_range_goes_from_a_task_to_its_report(create, tmp_path):
    study = optimize(create(target=[0.4, 0.7], selection="uniform"), 11)
    assert study.settings.target == (0.4, 0.7)
    trials, candidates = study.optuna_study.trials, study.candidates()
    low, high = study.front().band
    assert (low, high) == pytest.approx((0.4 * 0.9, 0.7 * 1.1))
    for trial, candidate in zip(trials, candidates, strict=True):
        assert list(trial.params)[:3] == ["target", "split", "c_ssvd"]
        assert candidate.feasible == (low <= candidate.mac_ratio <= high)
        # What was asked for is what came of it, but for whole ranks and channels.
        assert candidate.mac_ratio == pytest.approx(trial.params["target"], rel=0.15)
    front = study.front().best
    assert len(front) > 1 and front[0].mac_ratio < 0.5
    fewest = study.best(max_drop=1.0)
    assert fewest == front[0] and study.best() == front[-1]
    text = str(study.status())
    assert f"Front so far:\n{study.front()}" in text
    header = str(study.front()).splitlines()[0].split()
    assert header[:5] == ["trial", "target", "split", "c_ssvd", "c_cp"]
    (finalist,) = study.finalize(1, 1, progress=Progress(Console(file=io.StringIO())))
    assert finalist.state == "complete" and finalist.params == candidates[finalist.finalist_of].params
    files = study.report(fewest)
    page = files.page.read_text(encoding="utf-8")
    assert "Target mac_ratio 0.4 to 0.7, band 0.36 to 0.77. 11 trials" in page
    assert "target 0.4" in page and "target 0.7" in page
    rows = list(csv.DictReader(io.StringIO(files.table.read_text(encoding="utf-8"))))
    assert [float(row["param_target"]) for row in rows][:3] == [t.params["target"] for t in trials[:3]]
    exported = json.loads((study.export(fewest).folder / "candidate.json").read_text())
    assert exported["search_params"] == fewest.params
    loaded = load_study("first", workspace=tmp_path)
    assert loaded.settings == study.settings and loaded.front() == study.front()
    assert "target" in str(study.trial_history(3))
    with pytest.raises(StudyMismatchError, match=r"target: stored \[0.4, 0.7\], asked \[0.4, 0.6\]"):
        create(target=(0.4, 0.6), selection="uniform")


def test_a_study_that_chooses_its_methods(create):
    choices = ("spatial_svd+channel_pruning", "weight_svd+channel_pruning")
    study = optimize(create(variables={"methods": Choice(choices)}, selection="uniform"), 7)
    complete = [candidate for candidate in study.candidates() if candidate.state == "complete"]
    assert {candidate.params["methods"] for candidate in complete} == set(choices)
    trials = study.optuna_study.trials
    for candidate in complete:
        ratios = {name for name in candidate.params if name.startswith("c_")}
        assert trials[candidate.number].user_attrs["achieved"].keys() == ratios
        names = [stage.name for stage in candidate.stages if stage.name != "fine_tune"]
        assert set(names) <= set(candidate.params["methods"].split("+"))
        assert (
            profile_model(candidate.load_model(), study.task.example_input).macs == candidate.stages[-1].macs
        )
    page = study.report(study.best()).page.read_text(encoding="utf-8")
    assert "weight_svd+channel_pruning" in page


@pytest.mark.parametrize("directions", [["minimize", "minimize"], ["maximize"]])
def test_a_study_with_other_directions_is_refused(create, tmp_path, directions):
    storage = open_storage(None, Workspace(tmp_path).prepare())
    with quiet_optuna():
        optuna.create_study(study_name="first", storage=storage, directions=directions)
    found = ", ".join(directions)
    with pytest.raises(StudyMismatchError, match=f"directions: stored {found}; wanted maximize, minimize"):
        create()


def test_a_study_of_another_tool_is_refused(create, tmp_path):
    storage = open_storage(None, Workspace(tmp_path).prepare())
    with quiet_optuna():
        study = optuna.create_study(study_name="first", storage=storage, directions=DIRECTIONS)
    study.enqueue_trial({"x": 1})
    for opened in (create, lambda: load_study("first", workspace=tmp_path)):
        with pytest.raises(StudyMismatchError, match="was not made by compress_search"):
            opened()


def test_a_study_that_was_killed_while_it_was_created_is_created(create, tmp_path):
    storage = open_storage(None, Workspace(tmp_path).prepare())
    with quiet_optuna():
        optuna.create_study(study_name="first", storage=storage, directions=DIRECTIONS)
    study = create()
    assert study.optuna_study.metric_names == ["accuracy", "mac_ratio"]
    assert load_study("first", workspace=tmp_path).settings == study.settings


def test_a_study_of_a_later_version_is_not_misread(create):
    study = create()
    stored = study.optuna_study.user_attrs["compress_search"]
    settings = stored["settings"] | {"telepathy": True}
    study.optuna_study.set_user_attr("compress_search", stored | {"settings": settings})
    with pytest.raises(StudyMismatchError, match="whose settings this version cannot read"):
        create()


@pytest.mark.parametrize("name", ["", "a/b", "..", "ünder", "a b", "-x", *INTERNAL_NAMES])
def test_a_name_that_is_no_folder_is_refused(create, name):
    with pytest.raises(StudyError, match=r"use letters, digits and \. _ -"):
        create(name)


def test_a_name_that_is_too_long_for_a_folder_is_refused(create):
    with pytest.raises(StudyError, match="'xxxxxxxxxxxxxxxxxxxx'... has 201 characters; .* use at most 200"):
        create("x" * 201)


def test_bad_input_is_refused_before_anything_is_written(create, tiny_task, tmp_path):
    with pytest.raises(ConfigError):
        create(target=1.5)
    with pytest.raises(TaskError, match="train is empty"):
        create(task=tiny_task(train=[]))
    with pytest.raises(DeviceError, match="device is 'gpu'"):
        create(device="gpu")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EvaluationError):
        create(task=tiny_task(evaluate=lambda model, loader: float("nan")))
    with pytest.raises(StudyError, match="It has none"):
        load_study("first", workspace=tmp_path)
    with pytest.raises(ConfigError, match="3 faults") as caught:
        create(methods="spatial_svd", ignore="stem.*", fine_tune={"epochs": 3})
    assert [fault.partition(";")[0] for fault in caught.value.faults] == [
        "methods is 'spatial_svd', a single text",
        "ignore is 'stem.*', a single text",
        "fine_tune is {'epochs': 3}",
    ]
    with pytest.raises(ConfigError, match="2 faults") as caught:
        create(methods=None, ignore=3)
    assert caught.value.faults == (
        "methods is None; it must be a list of names.",
        "ignore is 3; it must be a list of names.",
    )
    with pytest.raises(StudyError, match=r"stop_when is \{'max_drop': 0.01\}; it must be a StopWhen"):
        create().optimize(1, stop_when={"max_drop": 0.01})
    for n_trials in ("3", 1.5, True):
        with pytest.raises(StudyError, match=f"n_trials is {n_trials!r}; .* must be a whole number"):
            create().optimize(n_trials)
    with pytest.raises(StudyError, match="n_trials is 0"):
        create().optimize(0)


def test_a_workspace_that_cannot_be_written_is_refused(create, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError):
        create(workspace=tmp_path / "file")


def test_a_study_that_does_not_exist_is_not_found_with_those_that_do(create, tmp_path):
    create("digits")
    create("letters")
    with pytest.raises(StudyError, match=r"It has: digits, letters\. Did you mean 'digits'\?"):
        load_study("digit", workspace=tmp_path)
    with pytest.raises(StudyError, match="There is no database"):
        load_study("digits", workspace=tmp_path / "elsewhere")


def test_a_task_without_test_data_says_so(create):
    study = optimize(create(), 1)
    with pytest.raises(TaskError, match="has no test data"):
        study.test(study.candidates()[0])


def test_the_status_of_a_study_with_interrupted_and_waiting_trials(create, monkeypatch):
    study = create()
    assert "0 trials finished (none yet)" in str(study.status())

    def stop(*_, **__):
        raise KeyboardInterrupt

    optimize(study, 1)
    with monkeypatch.context() as patched:
        patched.setattr("compress_search.training.trainer.fine_tune", stop)
        with pytest.raises(KeyboardInterrupt):
            optimize(study, 2)
    status = study.status()
    assert (status.n_interrupted, status.finished, status.wanted) == (1, 1, 2)
    assert status.counts["waiting"] == 3
    assert "Interrupted and run again: 1." in str(status)
    assert [c.state for c in study.candidates()] == ["complete", "waiting", "waiting", "waiting"]


def test_a_grid_ends_with_its_last_point(create, caplog):
    study = create(sampler="grid", grid={"c_ssvd": [0.9, 0.7]})
    with caplog.at_level(logging.INFO, logger="compress_search"):
        optimize(study, 20)
    assert "the study ends with 2 trials, not 20" in caplog.text
    first, second = study.candidates()
    assert [first.params["c_ssvd"], second.params["c_ssvd"]] == [0.9, 0.7]
    assert first.feasible and second.feasible
    assert study.status().wanted == 2
    optimize(study, 20)
    assert len(study.candidates()) == 2
    assert study.trial_history(1).folder == second.folder


def test_the_status_tells_a_trial_whose_process_is_gone_from_a_running_one(create):
    study = create()
    storage, number = study.optuna_study._storage, study.optuna_study._study_id
    here = Worker.this_process()
    for worker in (here, dataclasses.replace(here, started=-1e6)):
        trial = storage.create_new_trial(number)
        storage.set_trial_user_attr(trial, "worker", worker.to_dict())
    text = str(study.status())
    assert "Running: trial 0, finished so far: nothing." in text
    assert "Abandoned (its process is gone; resume runs it again): trial 1," in text


def test_the_status_tells_who_computes_what_and_who_waits_for_it(create):
    study = create()
    storage, number = study.optuna_study._storage, study.optuna_study._study_id
    here = Worker.this_process()
    elsewhere, stranger, dead = (
        dataclasses.replace(here, **changes)
        for changes in ({"host": "elsewhere"}, {"host": "strange"}, {"started": 1.0})
    )
    for worker in (here, elsewhere, dead):
        trial = storage.create_new_trial(number)
        storage.set_trial_user_attr(trial, "worker", worker.to_dict())

    def write(name, holder, since=0.0):
        lease = Lease("spatial_svd", holder, "token", since)
        (study.workspace.stages / name).write_text(lease.to_json())

    write("a.lease", here, since=1.0)
    write("a.lease.waiting-1", elsewhere)
    write("a.lease.waiting-2", stranger)
    write("b.lease", elsewhere, since=2.0)
    write("c.lease", stranger)
    write("d.lease", dead)
    first, second = study.status().computing
    assert first.startswith(f"Being computed: spatial_svd, by process {here.pid} on {here.host} since ")
    assert first.endswith(f" for trial 0; trial 1, process {here.pid} on strange wait for it.")
    assert second.endswith(" for trial 1.")
    assert first in str(study.status())
