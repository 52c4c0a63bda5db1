"""Finalists: the best candidates are trained on for longer, each as a trial of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from compress_search.recipe import FineTune, Recipe
from compress_search.results import Candidate, pareto_optimal
from compress_search.search.claims import claiming
from compress_search.search.history import FINALIST_OF, RECIPE, current_trials
from compress_search.search.recovery import queue_finalist, recover


def choose_origins(candidates: Iterable[Candidate], top_k: int) -> tuple[Candidate, ...]:
    """Pick the candidates that are worth a longer training.

    Args:
        candidates: All candidates of a study. Finalists are neither picked nor do they push others off the
            front, so that the pick stays the same when it has been trained.
        top_k: How many, at most.

    Returns:
        Feasible candidates, each model once: first those on the front, then the others, both from the most
        accurate down.
    """
    feasible = [c for c in candidates if c.feasible and c.finalist_of is None]
    front = pareto_optimal(feasible)
    best = {candidate.number for candidate in front}
    others = [candidate for candidate in feasible if candidate.number not in best]
    models: dict[str, Candidate] = {}
    for candidate in (*sorted(front, key=_from_the_best), *sorted(others, key=_from_the_best)):
        models.setdefault(candidate.stages[-1].key, candidate)
    return tuple(models.values())[:top_k]


def finalist_recipe(
    recipe: Recipe, *, epochs: int | None, settings: FineTune | None, otherwise: FineTune
) -> Recipe:
    """Return a candidate's recipe with one more fine-tuning at its end.

    Args:
        recipe: The candidate's.
        epochs: Number of epochs, stronger than those of ``settings``.
        settings: How to train; ``None`` is as the candidate was trained last, with ``epochs``.
        otherwise: What that means for a candidate that was never trained.
    """
    trained = [stage for stage in recipe.stages if isinstance(stage, FineTune)]
    tuning = settings or (trained[-1] if trained else otherwise)
    if epochs is not None:
        tuning = dataclasses.replace(tuning, epochs=epochs)
    return Recipe((*recipe.stages, tuning))


def queue_finalists(study: optuna.Study, recipes: Mapping[int, Recipe]) -> None:
    """Queue the finalists that there are not yet, and those that were interrupted.

    Args:
        study: The study.
        recipes: The wanted finalists' recipes, by the number of the trial that each begins with.
    """
    with claiming(study):
        # Two processes that ask for them at the same time would both find none.
        _queue_finalists(study, recipes, recover(study))


def _queue_finalists(
    study: optuna.Study, recipes: Mapping[int, Recipe], trials: Sequence[FrozenTrial]
) -> None:
    for number, recipe in recipes.items():
        known = find_finalist(trials, number, recipe)
        # A finalist that failed is tried again, because it was asked for again.
        if known is None or known.state == TrialState.FAIL:
            attributes = {FINALIST_OF: number, RECIPE: recipe.to_dict()}
            queue_finalist(study, trials[number], attributes)


def find_finalist(trials: Iterable[FrozenTrial], number: int, recipe: Recipe) -> FrozenTrial | None:
    """Return the last finalist of a trial with a recipe, if there is one."""
    found = [
        trial
        for trial in current_trials(trials)
        if trial.user_attrs.get(FINALIST_OF) == number
        and Recipe.from_dict(trial.user_attrs[RECIPE]) == recipe
    ]
    return found[-1] if found else None


def _from_the_best(candidate: Candidate) -> tuple[float, float, int]:
    assert candidate.accuracy is not None and candidate.mac_ratio is not None
    return -candidate.accuracy, candidate.mac_ratio, candidate.number
