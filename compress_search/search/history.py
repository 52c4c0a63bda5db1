"""What a study's trials say about themselves, and which of them count.

A trial that was interrupted is failed and queued again as a new trial, its *retry*, which reuses the stages
that were finished. So one proposal can have several trials, of which only the last counts.

A *finalist* is a trial that trains what another one ended as for longer. It is no proposal of the sampler,
and does not count towards the number of trials that was asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState

ANCHOR = "anchor"
"""User attribute: label of the anchor that the trial is."""
WORKER = "worker"
"""User attribute: host, process id and process start of who runs the trial."""
INTERRUPTED = "interrupted"
"""User attribute of a trial that was stopped from outside: ``"died"`` or ``"stopped"``."""
REASON = "reason"
"""User attribute: why the trial was pruned or failed, in words."""
TRACEBACK = "traceback"
"""User attribute: the last lines of the traceback of a failed trial."""
RETRY_OF = "retry_of"
"""User attribute of a retry: the number of the trial that it stands in for."""
RETRIES = "retries"
"""User attribute of a retry: how many retries in a row died without finishing a stage more."""
STAGES_BEFORE = "stages_before"
"""User attribute of a retry: how many stages the trial that it stands in for had finished."""
FINALIST_OF = "finalist_of"
"""User attribute of a finalist: the number of the trial whose model it trains on."""
RECIPE = "recipe"
"""User attribute: the stages of the trial, as JSON-able values. A finalist has it before it begins."""
LEARNING_CURVE = "learning_curve"
"""User attribute: of a fine-tuning that is not finished, the accuracy before and after its epochs."""
EPOCHS_BEFORE = "epochs_before"
"""User attribute of a retry: how many epochs of it the trial that it stands in for had done."""
DUPLICATE_OF = "duplicate_of"
"""User attribute of a retry that another one, with this number, made needless."""
STAGES = "stages"
"""User attribute: the finished stages, as JSON-able values."""

_ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def epochs_done(attributes: Mapping[str, Any]) -> int:
    """How many epochs are done of the fine-tuning that a trial runs, or did not finish.

    Args:
        attributes: User attributes of the trial.
    """
    return max(0, len(attributes.get(LEARNING_CURVE, ())) - 1)


def finished_trials(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that count towards a study's total: complete, pruned or failed, and not replaced."""
    return [t for t in current_trials(trials) if t.state in _ENDED and not is_finalist(t)]


def is_finalist(trial: FrozenTrial | Trial) -> bool:
    """Whether a trial trains another one's model on."""
    return FINALIST_OF in trial.user_attrs


def pending_finalists(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the finalists that wait or run."""
    return [trial for trial in trials if is_finalist(trial) and not trial.state.is_finished()]


def current_trials(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials without those that a retry stands in for, and without needless retries."""
    trials = list(trials)
    replaced = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    return [t for t in trials if t.number not in replaced and DUPLICATE_OF not in t.user_attrs]


def proposal_indices(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """Number the proposals of a study as if nothing had ever been interrupted, and without its finalists.

    Args:
        trials: All trials of the study.

    Returns:
        The proposal's index by trial number. A retry has the index of the trial that it stands in for;
        finalists have none.
    """
    retry_of = {t.number: t.user_attrs[RETRY_OF] for t in trials if RETRY_OF in t.user_attrs}
    # Not proposals of their own.
    others = sorted({*retry_of, *(trial.number for trial in trials if is_finalist(trial))})
    indices = {}
    for trial in trials:
        if is_finalist(trial):
            continue
        first = trial.number
        while first in retry_of:
            first = retry_of[first]
        indices[trial.number] = first - bisect_left(others, first)
    return indices
