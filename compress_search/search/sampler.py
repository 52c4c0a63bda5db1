"""Samplers: how the next point is proposed.

:data:`SAMPLERS` has one line a sampler. Each is used through :class:`ReproducibleSampler`, which makes what
it proposes depend on the seed and on the finished trials alone.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import optuna
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from compress_search.search.history import proposal_indices
from compress_search.search.spreading import farthest, has_step, is_early

SamplerFactory = Callable[[int, int], BaseSampler]
"""Makes a sampler from two seeds in [0, 2**32): of the value that it is to propose, and of the study."""

_POPULATION = 10
"""Trials of one generation. Optuna's 50 would be more than most studies have."""
_COORDINATES = 64
"""Of each point of the quasi-random sequence: more than there is to search."""

GRID = "grid"
"""The sampler that samples nothing: the settings list the points."""

SAMPLERS: Mapping[str, SamplerFactory] = {
    # Variables that have the same range in all trials are looked at together, the others each by itself.
    "tpe": lambda seed, _: TPESampler(seed=seed, multivariate=True),
    "random": lambda seed, _: RandomSampler(seed=seed),
    # The second ratio's range is another one in every trial, so that it is sampled by itself. That is meant.
    "gp": lambda seed, _: GPSampler(seed=seed, warn_independent_sampling=False),
    "nsga2": lambda seed, _: GenerationsByProposal(population_size=_POPULATION, seed=seed),
    "qmc": lambda _, seed: SobolByProposal(seed),
    # Every ratio is given, so that it is asked for nothing.
    GRID: lambda seed, _: RandomSampler(seed=seed),
}

SPREADING = ("tpe",)
"""Those whose first ratios lie apart. Of ten drawn at random, as TPE begins otherwise, many are the same."""

_NEEDS_SCIPY = ("gp", "qmc")
_DIGITS = 10
_VALUABLE = (TrialState.COMPLETE, TrialState.PRUNED)


def missing_package(sampler: str) -> str | None:
    """Name the package that a sampler needs and that is not installed, if there is one."""
    missing = sampler in _NEEDS_SCIPY and importlib.util.find_spec("scipy") is None
    return "scipy" if missing else None


def make_sampler(name: str, seed: int, *, by_accuracy: bool) -> ReproducibleSampler:
    """Make the sampler of a study.

    Args:
        name: A key of :data:`SAMPLERS`.
        seed: The study's seed.
        by_accuracy: See :class:`ReproducibleSampler`.
    """
    return ReproducibleSampler(SAMPLERS[name], seed, by_accuracy=by_accuracy, spread=name in SPREADING)


class GenerationsByProposal(NSGAIISampler):
    """NSGA-II whose generations follow from the trials alone.

    Optuna's notes down in the database which generation a trial belongs to and who its parents were. A trial
    that is run again has neither, so that a study that was interrupted would breed from others. Here so many
    complete trials, in the order of their proposal, are a generation; the parents are worked out again.
    """

    def get_trial_generation(self, study: optuna.Study, trial: FrozenTrial) -> int:
        """Count the generations that are complete."""
        return len(self._complete(study)) // _POPULATION

    def get_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        """Return the trials of one generation."""
        first = generation * _POPULATION
        return self._complete(study)[first : first + _POPULATION]

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        """Return the best of the generation before and of its own parents."""
        parents: list[FrozenTrial] = []
        for before in range(generation):
            parents = self._elite_population_selection_strategy(
                study, self.get_population(study, before) + parents
            )
        return parents

    def _complete(self, study: optuna.Study) -> list[FrozenTrial]:
        return study._get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


class SobolByProposal(BaseSampler):
    """The scrambled Sobol sequence: a trial's point is the one with the index of its proposal.

    Optuna's counts points in the database, so that a trial that is run again would take a further one, and it
    gives coordinates only to what has the same range in every trial. Here the first value of a trial gets the
    first coordinate, whatever its range, and so on.

    Args:
        seed: Scrambles the sequence.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Sample each variable by itself."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Sample no variables together."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Take the coordinate of one variable."""
        # It takes a second to import.
        from scipy.stats import qmc

        sequence = qmc.Sobol(_COORDINATES, seed=self._seed, scramble=True)
        if trial.number:
            sequence.fast_forward(trial.number)
        coordinate = sequence.random(1)[:, len(trial.params) % _COORDINATES]
        if isinstance(param_distribution, CategoricalDistribution):
            choices = param_distribution.choices
            return choices[int(coordinate[0] * len(choices))]
        space = _SearchSpaceTransform({param_name: param_distribution}, transform_0_1=True)
        return space.untransform(np.asarray(coordinate))[param_name]


class ReproducibleSampler(BaseSampler):
    """Proposes the same points whether or not a study was interrupted.

    The state of a sampler is not in the storage, and a trial that was interrupted comes back under a later
    number. So a new inner sampler is made for each value, seeded from the study's seed, the index of the
    proposal and the variable; and it sees the trials in the order in which they were proposed.

    Args:
        make: Makes the inner sampler.
        seed: The study's seed.
        by_accuracy: Whether the inner sampler sees the accuracy alone. Where there is one target every
            feasible candidate has the wanted MACs; a few less of them within the tolerance are no merit.
        spread: Whether, in the first trials, the first variable that has a step lies where nothing was tried,
            whatever the inner sampler would say. A second one would lie on a diagonal with it.
    """

    def __init__(
        self, make: SamplerFactory, seed: int, *, by_accuracy: bool = False, spread: bool = False
    ) -> None:
        self._make = make
        self._seed = seed
        self._by_accuracy = by_accuracy
        self._spread = spread
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
        space = self._relative.infer_relative_search_space(view, trial)
        if not self._spread or not is_early(view):
            return space
        assert self._view is not None
        ranges = {**space, **self._view.narrower}
        return {name: distribution for name, distribution in space.items() if not has_step(ranges[name])}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Sample the variables that the inner sampler samples together."""
        assert self._relative is not None
        view, trial = self._as_proposed(study, trial)
        values = self._relative.sample_relative(view, trial, search_space)
        assert self._view is not None
        ranges = {**search_space, **self._view.narrower}
        return {name: _tidy(value, ranges[name]) for name, value in values.items()}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Sample one variable."""
        view, trial = self._as_proposed(study, trial)
        if self._spread and self._is_first_on_a_grid(param_distribution, trial) and is_early(view):
            others = view._get_trials(deepcopy=False)
            tried = [other.params[param_name] for other in others if param_name in other.params]
            values = farthest(param_distribution, tried)
            draw = np.random.default_rng(_seed_of(f"{self._seed}/{trial.number}/{param_name}"))
            return _tidy(draw.choice(values), param_distribution)
        inner = self._seeded_for(trial, param_name)
        return _tidy(
            inner.sample_independent(view, trial, param_name, param_distribution), param_distribution
        )

    @staticmethod
    def _is_first_on_a_grid(distribution: BaseDistribution, trial: FrozenTrial) -> bool:
        return has_step(distribution) and not any(map(has_step, trial.distributions.values()))

    def _seeded_for(self, trial: FrozenTrial, variable: str) -> BaseSampler:
        return self._make(_seed_of(f"{self._seed}/{trial.number}/{variable}"), _seed_of(f"{self._seed}"))

    def _as_proposed(self, study: optuna.Study, trial: FrozenTrial) -> tuple[optuna.Study, FrozenTrial]:
        """Give the study and the trial as the inner sampler is to see them."""
        if self._view is None or self._view.trial_id != trial._trial_id:
            self._view = _StudyAsProposed(study, trial, by_accuracy=self._by_accuracy)
        return cast("optuna.Study", self._view), _with_number(trial, self._view.index)


class _StudyAsProposed:
    """A study whose trials are numbered by proposal, without those that were replaced by a retry.

    Finalists are left out too: they were trained for longer, so that they say nothing of what the same ratios
    would come to in another trial.

    Samplers that model several variables at once look only at those that have the same range in all trials.
    The first ratio has one, but for the anchors, which have no choice: here they all have the range that
    holds every one of them.

    Like Optuna's own cache, it shows the study as it was when one trial began.

    Attributes:
        directions: Of what the inner sampler sees of the values.
        trial_id: Of the trial that began.
        index: Of its proposal.
        narrower: The range that a trial may choose from, by the variables whose range was widened.
    """

    def __init__(self, study: optuna.Study, trial: FrozenTrial, *, by_accuracy: bool) -> None:
        self._study = study
        self.directions = study.directions[:1] if by_accuracy else study.directions
        trials = study.get_trials(deepcopy=False)
        indices = proposal_indices(trials)
        proposed = {}
        for other in sorted(trials, key=lambda t: (t.state in _VALUABLE, t.number)):
            if other.number in indices:
                proposed[indices[other.number]] = other
        ordered = [_with_number(other, index) for index, other in sorted(proposed.items())]
        if by_accuracy:
            ordered = [_with_accuracy_alone(other) for other in ordered]
        self._trials, self.narrower = _with_shared_ranges(ordered)
        self.trial_id = trial._trial_id
        # For a finalist nothing is sampled.
        self.index = indices.get(trial.number, trial.number)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    @property
    def direction(self) -> StudyDirection:
        return self.directions[0]

    def _is_multi_objective(self) -> bool:
        return len(self.directions) > 1

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


def _with_accuracy_alone(trial: FrozenTrial) -> FrozenTrial:
    if trial.values is None:
        return trial
    changed = copy.copy(trial)
    changed.values = trial.values[:1]
    return changed


def _with_shared_ranges(
    trials: Sequence[FrozenTrial],
) -> tuple[list[FrozenTrial], dict[str, FloatDistribution]]:
    """Widen the ranges that are the same in all trials but those where they are a single value.

    Returns:
        The trials, and the ranges as they were, by the names of those that were widened.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    names = {name for trial in complete for name in trial.distributions}
    narrower, wider = {}, {}
    for name in sorted(names):
        ranges = {trial.distributions[name] for trial in complete if name in trial.distributions}
        choices = [one for one in ranges if not one.single()]
        if len(ranges) > 1 and len(choices) == 1 and isinstance(choices[0], FloatDistribution):
            narrower[name], wider[name] = choices[0], _hull(cast("Iterable[FloatDistribution]", ranges))
    return [_with_ranges(trial, wider) for trial in trials] if wider else [*trials], narrower


def _hull(ranges: Iterable[FloatDistribution]) -> FloatDistribution:
    ranges = list(ranges)
    return FloatDistribution(
        min(one.low for one in ranges), max(one.high for one in ranges), log=all(one.log for one in ranges)
    )


def _with_ranges(trial: FrozenTrial, ranges: Mapping[str, BaseDistribution]) -> FrozenTrial:
    changed = copy.copy(trial)
    changed.distributions = {
        name: ranges.get(name, distribution) for name, distribution in trial.distributions.items()
    }
    return changed


def _seed_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def _tidy(value: Any, distribution: BaseDistribution) -> Any:
    """Cut the noise of binary fractions: 0.63, not 0.6300000000000001."""
    if not isinstance(distribution, FloatDistribution):
        return value
    if distribution.log:
        # Of a number such as 1.5e-9, ten decimals would leave nothing.
        value = float(f"{value:.{_DIGITS}g}")
        return min(max(value, distribution.low), distribution.high)
    if distribution.step is not None:
        steps = round((value - distribution.low) / distribution.step)
        value = distribution.low + steps * distribution.step
    return min(max(round(value, _DIGITS), distribution.low), distribution.high)
