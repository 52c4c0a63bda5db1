"""Search how to compress a trained PyTorch CNN, as one resumable Optuna study.

The names below are imported when they are first used, so that ``compress-search --help`` and other commands
that need no tensors do not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress_search.compression import compress, measure_sensitivity
    from compress_search.exceptions import CompressSearchError
    from compress_search.plan import CompressionPlan, apply_plan
    from compress_search.profile import ModelProfile, profile_model
    from compress_search.recipe import Compress, FineTune, Recipe
    from compress_search.results import Candidate, ParetoFront
    from compress_search.search.stop_when import StopWhen
    from compress_search.search.study import CompressionStudy, create_study, load_study
    from compress_search.search.variables import Choice, Range
    from compress_search.selection.table import SensitivityTable
    from compress_search.task import Task, accuracy
    from compress_search.training.own_function import TrainingJob

__version__ = metadata.version("compress-search")

_HOMES = {
    "compress": "compression",
    "measure_sensitivity": "compression",
    "CompressSearchError": "exceptions",
    "CompressionPlan": "plan",
    "apply_plan": "plan",
    "ModelProfile": "profile",
    "profile_model": "profile",
    "Compress": "recipe",
    "FineTune": "recipe",
    "Recipe": "recipe",
    "Candidate": "results",
    "ParetoFront": "results",
    "StopWhen": "search.stop_when",
    "CompressionStudy": "search.study",
    "create_study": "search.study",
    "load_study": "search.study",
    "Choice": "search.variables",
    "Range": "search.variables",
    "SensitivityTable": "selection.table",
    "Task": "task",
    "TrainingJob": "training.own_function",
    "accuracy": "task",
}

__all__ = [
    "Candidate",
    "Choice",
    "Compress",
    "CompressSearchError",
    "CompressionPlan",
    "CompressionStudy",
    "FineTune",
    "ModelProfile",
    "ParetoFront",
    "Range",
    "Recipe",
    "SensitivityTable",
    "StopWhen",
    "Task",
    "TrainingJob",
    "accuracy",
    "apply_plan",
    "compress",
    "create_study",
    "load_study",
    "measure_sensitivity",
    "profile_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    # From now on it is an ordinary name of this module, which is looked up without coming here.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
