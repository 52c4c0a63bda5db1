"""The median stopping rule: which trials are given up, when, and that interruptions change none of it."""

from __future__ import annotations

import io

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial
from rich.console import Console

from compress_search.exceptions import ConfigError
from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.results import StageResult
from compress_search.search.history import ANCHOR, FINALIST_OF, LEARNING_CURVE, RECIPE, STAGES, current_trials
from compress_search.search.median_stopping import LEAST_RIVALS, why_behind
from compress_search.search.space import enqueue_anchors
from compress_search.search.study import create_study
from compress_search.search.worker import run_trials
from compress_search.stopping import StopSwitch

EPOCHS = 4


def rival(*curve, mac_ratio=0.5, state=TrialState.COMPLETE, attributes=()):
    stage = StageResult("key", "fine_tune", curve[-1], 500, 50, mac_ratio, 1.0, learning_curve=curve)
    values = [curve[-1], mac_ratio] if state == TrialState.COMPLETE else None
    attributes = {STAGES: [stage.to_dict()], **dict(attributes)}
    return create_trial(state=state, values=values, user_attrs=attributes)


def why(curve, rivals, *, target=0.5, mac_ratio=0.5, epochs=EPOCHS):
    return why_behind(curve, epochs=epochs, mac_ratio=mac_ratio, trials=rivals, target=target, tolerance=0.02)


def rivals_with(second, number=LEAST_RIVALS):
    """Trials that had 0.5 before the first epoch, ``second`` after it, and 0.9 from the next one on."""
    return [rival(0.5, second, 0.9, 0.9, 0.9) for _ in range(number)]


def test_a_trial_that_is_behind_is_given_up_with_the_reason():
    assert why((0.5, 0.69), rivals_with(0.7)) == (
        "after 1 of 4 epochs of the last fine-tuning the accuracy is 0.6900, and half of 4 other trials had "
        "0.7000 or more by then (median_stopping)"
    )


@pytest.mark.parametrize(
    ("curve", "rivals"),
    [
        ((0.5, 0.7), rivals_with(0.7)),
        # What is kept is the best epoch.
        ((0.71, 0.6), rivals_with(0.7)),
        ((0.5, 0.6), rivals_with(0.7, LEAST_RIVALS - 1)),
        # Trained to its end.
        ((0.5, 0.6, 0.6, 0.6, 0.6), rivals_with(0.7)),
    ],
    ids=["as good", "was better", "too few", "done"],
)
def test_a_trial_goes_on_that_is_not_behind_or_cannot_be_compared(curve, rivals):
    assert why(curve, rivals) is None


@pytest.mark.parametrize(
    "other",
    [
        {"mac_ratio": 0.6},
        {"state": TrialState.PRUNED},
        {"state": TrialState.RUNNING},
        {"attributes": {FINALIST_OF: 1}},
    ],
    ids=["outside the band", "pruned", "running", "finalist"],
)
def test_those_do_not_count_as_rivals(other):
    rivals = rivals_with(0.7, LEAST_RIVALS - 1)
    assert why((0.5, 0.6), [*rivals, rival(0.5, 0.7, 0.9, 0.9, 0.9, **other)]) is None
    assert why((0.5, 0.6), [*rivals, rival(0.5, 0.7, 0.9, 0.9, 0.9)]) is not None


def test_trainings_of_another_length_and_untold_ones_do_not_count():
    assert why((0.5, 0.6), [rival(0.5, 0.7, 0.9) for _ in range(9)]) is None
    assert why((0.5, 0.6), [rival(0.9) for _ in range(9)]) is None
    assert why((0.5, 0.6), [create_trial(state=TrialState.COMPLETE, values=[0.9, 0.5])] * 9) is None


def test_in_a_range_only_those_with_no_more_macs_count():
    rivals = [rival(0.5, 0.7, 0.9, 0.9, 0.9, mac_ratio=ratio) for ratio in (0.3, 0.4, 0.5, 0.6)]
    assert why((0.5, 0.6), rivals, target=(0.3, 0.8), mac_ratio=0.59) is None
    said = why((0.5, 0.6), rivals, target=(0.3, 0.8), mac_ratio=0.6)
    assert "half of 4 other trials with no more MACs had 0.7000" in said


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=EPOCHS + 1, max_size=EPOCHS + 1), max_size=9),
    st.lists(st.integers(0, 9), min_size=2, max_size=EPOCHS),
)
def test_at_least_half_of_the_rivals_are_ahead_of_one_that_is_given_up(curves, own):
    given_up = why(own, [rival(*curve) for curve in curves]) is not None
    ahead = sum(max(curve[: len(own)]) > max(own) for curve in curves)
    level = sum(max(curve[: len(own)]) == max(own) for curve in curves)
    if given_up:
        assert len(curves) >= LEAST_RIVALS and 2 * ahead >= len(curves)
    elif len(curves) >= LEAST_RIVALS:
        # Where two are in the middle, one of them may be ahead and the other level.
        assert 2 * (ahead + level) <= 2 * level + len(curves)


# In a study


@pytest.fixture
def settings(make_settings):
    return make_settings(fine_tune=FineTune(epochs=EPOCHS), median_stopping=True)


def search(study, objective, n_trials):
    progress = Progress(Console(file=io.StringIO()))
    run_trials(study, objective, n_trials=n_trials, progress=progress, stop=StopSwitch())


def test_a_study_gives_up_trials_and_tells_how_far_they_came(new_study, objective, runner, settings):
    study = new_study(settings=settings)
    enqueue_anchors(study, settings)
    search(study, objective(runner, settings), 20)
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert pruned and all(ANCHOR not in trial.user_attrs for trial in pruned)
    for trial in pruned:
        stages, curve = trial.user_attrs[STAGES], trial.user_attrs[LEARNING_CURVE]
        # Given up in its last stage, and before that was done.
        assert len(stages) == len(trial.user_attrs[RECIPE]) - 1 and 2 <= len(curve) <= EPOCHS
        assert f"after {len(curve) - 1} of 4 epochs" in trial.user_attrs["reason"]
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert all(trial.user_attrs[LEARNING_CURVE] == [] for trial in complete)
    without = new_study("without", settings)
    enqueue_anchors(without, settings)
    search(without, objective(type(runner)()), 4)
    # The anchors are the same as ever, and the best is among them or after them.
    assert [t.values for t in study.trials[:4]] == [t.values for t in without.trials]


def test_without_the_setting_none_is_given_up(new_study, objective, runner, make_settings):
    settings = make_settings(fine_tune=FineTune(epochs=EPOCHS))
    study = new_study(settings=settings)
    enqueue_anchors(study, settings)
    search(study, objective(runner, settings), 20)
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}


def test_anchors_and_finalists_are_trained_to_their_end(study_in_memory, objective, runner, settings):
    study = study_in_memory(settings)
    for _ in range(LEAST_RIVALS):
        study.add_trial(rival(0.9, 0.9, 0.9, 0.9, 0.9))
    run = objective(runner, settings)
    trial = study.ask()
    with pytest.raises(optuna.TrialPruned, match=r"after 1 of 4 epochs .*median_stopping"):
        run(trial)
    study.enqueue_trial({}, user_attrs={ANCHOR: "guidebook"})
    accuracy, _ = run(study.ask())
    assert accuracy < 0.9
    study.enqueue_trial({}, user_attrs={FINALIST_OF: 0, RECIPE: trial.user_attrs[RECIPE]})
    assert run(study.ask())[0] < 0.9


@pytest.mark.slow
def test_interrupted_anywhere_the_same_trials_are_given_up(new_study, objective, runner, settings):
    def outcome(study):
        trials = current_trials(study.trials)
        return sorted((t.state.name, tuple(t.params.items()), t.values or ()) for t in trials)

    undisturbed = new_study("undisturbed", settings)
    enqueue_anchors(undisturbed, settings)
    search(undisturbed, objective(runner, settings), 12)
    for stop_at in (3, 18, 38):
        study, interrupted = new_study(f"stopped-{stop_at}", settings), type(runner)()
        enqueue_anchors(study, settings)
        begun = []

        def before_stage(stage, begun=begun, stop_at=stop_at):
            begun.append(stage)
            if len(begun) == stop_at:
                raise KeyboardInterrupt

        interrupted.before_stage = before_stage
        with pytest.raises(KeyboardInterrupt):
            search(study, objective(interrupted, settings), 12)
        search(study, objective(interrupted, settings), 12)
        assert outcome(study) == outcome(undisturbed)


def test_what_is_no_truth_value_is_refused(make_settings):
    with pytest.raises(ConfigError, match="median_stopping is 'yes'; it must be true or false"):
        make_settings(median_stopping="yes")


def test_trials_of_a_training_function_that_tells_of_its_epochs_are_given_up(tiny_task, tmp_path):
    calls = iter(range(100))

    def training(model, job):
        # Each time a little worse than the last.
        job.epoch_done(1, 0.9 - 0.01 * next(calls))
        job.epoch_done(2, 0.95)

    task = tiny_task(training=training, evaluate=lambda *_: 0.1)
    study = create_study(
        "told",
        task,
        target=0.5,
        workspace=tmp_path,
        tolerance=0.1,
        samples=8,
        scoring_samples=8,
        fine_tune=FineTune(epochs=2),
        median_stopping=True,
    )
    study.optimize(8, progress=Progress(Console(file=io.StringIO())))
    states = [candidate.state for candidate in study.candidates()]
    assert states == ["complete"] * LEAST_RIVALS + ["pruned"] * 4
    last = study.candidates()[-1]
    assert len(last.learning_curve) == 2 and "after 1 of 2 epochs" in last.reason
