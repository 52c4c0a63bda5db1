"""Samplers: how the next point is proposed.

:data:`SAMPLERS` has one line a sampler. Each is used through :class:`ReproducibleSampler`, which makes what
it proposes depend on the seed and on the finished trials alone.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from compress_search.search.history import proposal_indices

SamplerFactory = Callable[[int], BaseSampler]
"""Makes a sampler from a seed in [0, 2**32)."""

SAMPLERS: Mapping[str, SamplerFactory] = {
    # The ranges differ from trial to trial, so that a multivariate TPE would sample each alone anyway.
    "tpe": lambda seed: TPESampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}

_DIGITS = 10
_VALUABLE = (TrialState.COMPLETE, TrialState.PRUNED)


class ReproducibleSampler(BaseSampler):
    """Proposes the same points whether or not a study was interrupted.

    The state of a sampler is not in the storage, and a trial that was interrupted comes back under a later
    number. So a new inner sampler is made for each value, seeded from the study's seed, the index of the
    proposal and the variable; and it sees the trials in the order in which they were proposed.

    Args:
        make: Makes the inner sampler.
        seed: The study's seed.
    """

    def __init__(self, make: SamplerFactory, seed: int) -> None:
        self._make = make
        self._seed = seed
        self._relative: BaseSampler | None = None
        self._view: _StudyAsProposed | None = None

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Tell the inner sampler that a trial begins."""
        view, trial = self._as_proposed(study, trial)
        self._seeded_for(trial, "").before_trial(view, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Tell the inner sampler that a trial ends."""
        view, trial = self._as_proposed(study, trial)
        self._seeded_for(trial, "").after_trial(view, trial, state, values)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Ask the inner sampler which variables it samples together."""
        view, trial = self._as_proposed(study, trial)
        self._relative = self._seeded_for(trial, "")
        return self._relative.infer_relative_search_space(view, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Sample the variables that the inner sampler samples together."""
        assert self._relative is not None
        view, trial = self._as_proposed(study, trial)
        values = self._relative.sample_relative(view, trial, search_space)
        return {name: _tidy(value, search_space[name]) for name, value in values.items()}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Sample one variable."""
        view, trial = self._as_proposed(study, trial)
        inner = self._seeded_for(trial, param_name)
        return _tidy(
            inner.sample_independent(view, trial, param_name, param_distribution), param_distribution
        )

    def _seeded_for(self, trial: FrozenTrial, variable: str) -> BaseSampler:
        digest = hashlib.sha256(f"{self._seed}/{trial.number}/{variable}".encode()).digest()
        return self._make(int.from_bytes(digest[:4]))

    def _as_proposed(self, study: optuna.Study, trial: FrozenTrial) -> tuple[optuna.Study, FrozenTrial]:
        """Give the study and the trial as the inner sampler is to see them."""
        if self._view is None or self._view.trial_id != trial._trial_id:
            self._view = _StudyAsProposed(study, trial)
        return cast("optuna.Study", self._view), _with_number(trial, self._view.index)


class _StudyAsProposed:
    """A study whose trials are numbered by proposal, without those that were replaced by a retry.

    Finalists are left out too: they were trained for longer, so that they say nothing of what the same ratios
    would come to in another trial.

    Like Optuna's own cache, it shows the study as it was when one trial began.
    """

    def __init__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._study = study
        trials = study.get_trials(deepcopy=False)
        indices = proposal_indices(trials)
        proposed = {}
        for other in sorted(trials, key=lambda t: (t.state in _VALUABLE, t.number)):
            if other.number in indices:
                proposed[indices[other.number]] = other
        self._trials = [_with_number(other, index) for index, other in sorted(proposed.items())]
        self.trial_id = trial._trial_id
        # For a finalist nothing is sampled.
        self.index = indices.get(trial.number, trial.number)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials


def _with_number(trial: FrozenTrial, number: int) -> FrozenTrial:
    if trial.number == number:
        return trial
    renumbered = copy.copy(trial)
    renumbered.number = number
    return renumbered


def _tidy(value: Any, distribution: BaseDistribution) -> Any:
    """Cut the noise of binary fractions: 0.63, not 0.6300000000000001."""
    if not isinstance(distribution, FloatDistribution):
        return value
    if distribution.log:
        # Of a number such as 1.5e-9, ten decimals would leave nothing.
        value = float(f"{value:.{_DIGITS}g}")
        return min(max(value, distribution.low), distribution.high)
    return min(max(round(value, _DIGITS), distribution.low), distribution.high)
