"""The objective: one trial from its proposal to its accuracy and MAC ratio, and all it has to tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import optuna

from compress_search.methods import METHODS
from compress_search.recipe import FineTune, Recipe, Stage
from compress_search.reports.trials import achieved_ratios
from compress_search.results import Reference, StageResult
from compress_search.search.history import ANCHOR, LEARNING_CURVE, RECIPE, STAGES, is_finalist
from compress_search.search.median_stopping import why_behind
from compress_search.search.settings import SearchSettings
from compress_search.search.space import Proposal, propose
from compress_search.target import excess

METRICS = ("accuracy", "mac_ratio")
CONSTRAINT = "mac_ratio"


class Runner(Protocol):
    """What the objective needs of a :class:`compress_search.stages.StageRunner`."""

    def achieved_ratio(self, stages: Sequence[Stage]) -> float:
        """The exact MAC ratio after some stages."""

    def run(
        self,
        recipe: Recipe,
        *,
        after_stage: Callable[[Stage, StageResult], None] | None = None,
        after_epoch: Callable[[Sequence[float]], None] | None = None,
    ) -> tuple[StageResult, ...]:
        """Run a recipe."""


def run_trial(
    trial: optuna.Trial, *, settings: SearchSettings, runner: Runner, reference: Reference
) -> tuple[float, float]:
    """Compress, fine-tune and judge one candidate, or train a finalist on.

    What is finished is written into the trial's user attributes after every stage and epoch, so that a trial
    that is running or was killed tells how far it is.

    Args:
        trial: A running trial.
        settings: The study's settings.
        runner: Runs the stages.
        reference: The original model's numbers.

    Returns:
        Accuracy on the validation data, and MACs / MACs of the original.

    Raises:
        optuna.TrialPruned: The accuracy after the first method is too low to go on, or that after an epoch
            is behind the other trials'.
        RatioError: A ratio cannot be reached.
    """
    if is_finalist(trial):
        # Its origin has passed the gate.
        proposal = Proposal(Recipe.from_dict(trial.user_attrs[RECIPE]), gate_after=None)
    else:
        proposal = propose(trial, settings, runner.achieved_ratio)
        trial.set_user_attr(RECIPE, proposal.recipe.to_dict())
    finished: list[StageResult] = []

    def after_stage(_: Stage, result: StageResult) -> None:
        finished.append(result)
        trial.set_user_attr(STAGES, [stage.to_dict() for stage in finished])
        if LEARNING_CURVE in trial.user_attrs:
            trial.set_user_attr(LEARNING_CURVE, [])
        drop = reference.accuracy - result.accuracy
        most = settings.max_drop_after_ssvd
        if len(finished) == proposal.gate_after and most is not None and drop > most:
            done = ", ".join(stage.name for stage in finished)
            raise optuna.TrialPruned(
                f"after {done} the accuracy is {result.accuracy:.4f}, {drop:.4f} below the original's; "
                f"max_drop_after_ssvd allows {most:.4f}"
            )

    stages = proposal.recipe.stages
    may_stop = settings.median_stopping and not is_finalist(trial) and ANCHOR not in trial.user_attrs

    def after_epoch(curve: Sequence[float]) -> None:
        trial.set_user_attr(LEARNING_CURVE, [*curve])
        last = stages[-1]
        if not may_stop or len(finished) < len(stages) - 1 or not isinstance(last, FineTune):
            return
        behind = why_behind(
            curve,
            epochs=last.epochs,
            mac_ratio=finished[-1].mac_ratio,
            trials=trial.study.get_trials(deepcopy=False),
            target=settings.target,
            tolerance=settings.tolerance,
        )
        if behind is not None:
            raise optuna.TrialPruned(behind)

    last = runner.run(proposal.recipe, after_stage=after_stage, after_epoch=after_epoch)[-1]
    left_out = {method.ratio_name: 1.0 for method in METHODS.values() if method.ratio_name in trial.params}
    numbers = {
        "accuracy": last.accuracy,
        "drop": reference.accuracy - last.accuracy,
        "mac_ratio": last.mac_ratio,
        "macs": last.macs,
        "params": last.params,
        "achieved": left_out | achieved_ratios(finished),
        "seconds": sum(stage.seconds for stage in finished if not stage.reused),
        "seconds_saved": sum(stage.seconds for stage in finished if stage.reused),
        "key": last.key,
    }
    for name, value in numbers.items():
        trial.set_user_attr(name, value)
    # Last, and on the only way out: a complete trial without its constraint would count as feasible.
    trial.set_constraint(CONSTRAINT, excess(last.mac_ratio, settings.target, settings.tolerance))
    return last.accuracy, last.mac_ratio
