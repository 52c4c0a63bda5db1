"""The first proposals of TPE lie apart."""

from __future__ import annotations

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution

from compress_search.search.sampler import make_sampler
from compress_search.search.spreading import farthest

GRID = FloatDistribution(0.1, 1.0, step=0.1)


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ([], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ([0.1], [1.0]),
        ([0.1, 1.0], [0.5, 0.6]),
        ([0.05, 1.0], [0.5]),
        ([0.1, 0.4, 1.0], [0.7]),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0], [0.9]),
    ],
)
def test_the_farthest_of_a_grid(tried, expected):
    assert farthest(GRID, tried) == pytest.approx(expected)


@given(st.lists(st.sampled_from([n / 10 for n in range(1, 11)]), max_size=9))
def test_what_was_tried_is_not_proposed_while_something_was_not(tried):
    assert all(min(abs(value - one) for one in tried) > 0.05 for value in farthest(GRID, tried) if tried)


def suggested(n, seed=0, value=lambda c: 1.0, tell=True):
    """What TPE proposes for two variables on a grid, after two trials that had no choice."""
    study = optuna.create_study(sampler=make_sampler("tpe", seed, by_accuracy=True))
    found = []
    for number in range(n):
        trial = study.ask()
        low, high = [(0.1, 0.1), (1.0, 1.0), (0.1, 1.0)][min(number, 2)]
        c = trial.suggest_float("c", low, high, **({"step": 0.1} if low < high else {}))
        found.append((c, trial.suggest_float("d", 0.1, 1.0, step=0.1)))
        if tell:
            study.tell(trial, value(c))
    return found


@pytest.mark.parametrize("tell", [True, False])
def test_the_first_proposals_cover_the_grid_whether_the_others_have_ended_or_not(tell):
    found = [[c for c, _ in suggested(10, seed, tell=tell)] for seed in (0, 0, 1)]
    assert len(set(found[0])) == len(set(found[2])) == 10
    assert found[0] == found[1] != found[2]


def test_a_second_variable_is_not_spread_along_with_the_first():
    assert any(len({d for _, d in suggested(10, seed)}) < 10 for seed in range(3))


def test_after_the_first_ones_what_did_best_is_proposed_again():
    later = [c for c, _ in suggested(40, value=lambda c: abs(c - 0.3))[20:]]
    assert sum(abs(c - 0.3) < 0.15 for c in later) > len(later) / 2
