"""First proposals that lie apart: a variable on a grid takes the values that are far from what was tried."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState

_AT_FIRST = 20
"""So many trials, anchors included, lie apart: as many as there are ratios of the usual step of 0.05."""

_TOLERANCE = 1e-9
"""Distances that differ by less are equal."""


def is_early(study: optuna.Study) -> bool:
    """Whether a study has too few trials for its best one to be worth looking around it."""
    ended = study._get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return len(ended) < _AT_FIRST


def has_step(distribution: BaseDistribution) -> bool:
    """Whether a variable lies on a grid, as the first of two methods' ratio does."""
    return isinstance(distribution, FloatDistribution) and distribution.step is not None


def farthest(values: BaseDistribution, tried: Sequence[float]) -> list[float]:
    """Return the values, one or several, whose nearest neighbour among those tried is farthest away.

    Args:
        values: To choose from; they have a step.
        tried: May lie outside of that range.
    """
    assert isinstance(values, FloatDistribution) and values.step is not None
    points = values.low + values.step * np.arange(round((values.high - values.low) / values.step) + 1)
    distances = np.abs(points[:, None] - np.asarray(tried or [-np.inf])).min(axis=1)
    return [float(point) for point in points[distances >= distances.max() - _TOLERANCE]]
