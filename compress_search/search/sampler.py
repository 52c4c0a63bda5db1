"""Samplers: how the next point is proposed. One line of a table each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from optuna.samplers import BaseSampler, RandomSampler, TPESampler

SamplerFactory = Callable[[int], BaseSampler]
"""Makes a sampler from a seed in [0, 2**32)."""

SAMPLERS: Mapping[str, SamplerFactory] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}
