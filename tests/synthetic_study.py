"""A study that was never run: its numbers are of closed form, so any number of trials is made in no time.

It lies in a workspace like any other, with the files of stages, and has trials of every kind: feasible and
not, pruned, failed with HTML in its reason, running, waiting, a retry, a finalist, one whose files are gone.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution
from optuna.study import create_study
from optuna.trial import FrozenTrial, TrialState, create_trial
from torch import nn

from compress_search.checkpoint import save_weights
from compress_search.fingerprint import content_hash
from compress_search.plan import CompressionPlan, FactoriseLayer, KeepChannels, Part, PlanStep, apply_plan
from compress_search.recipe import Compress, FineTune, Recipe
from compress_search.results import Reference, StageResult
from compress_search.search.compression_study import CompressionStudy
from compress_search.search.identity import DIRECTIONS, Identity, current_versions
from compress_search.search.objective import CONSTRAINT, METRICS
from compress_search.search.settings import SearchSettings
from compress_search.search.storage import open_storage, quiet_optuna
from compress_search.search.study import load_study
from compress_search.stage_files import PLAN, WEIGHTS, seal
from compress_search.workspace import Workspace

REFERENCE = Reference(accuracy=0.9, macs=10_000, params=500)
SETTINGS = SearchSettings(target=0.5, tolerance=0.02, fine_tune=FineTune(epochs=2))
HTML = (
    "<img src=x onerror=\"document.title='hacked'\"><script>alert(1)</script> **bold** [a](http://b) `c` | d"
)
"""What must be shown as it is, wherever it comes from."""

INFEASIBLE, PRUNED, FAILED, GONE = 3, 4, 5, 6
"""What the trials are whose numbers divided by ten leave these: all others are feasible."""

SVD = PlanStep(
    method="spatial_svd",
    mac_ratio=0.75,
    edits=(
        FactoriseLayer(
            "3",
            5,
            (
                Part(
                    "vertical",
                    "Conv2d",
                    {
                        "in_channels": 4,
                        "out_channels": 5,
                        "kernel_size": (3, 1),
                        "stride": (2, 1),
                        "padding": (1, 0),
                        "bias": False,
                    },
                ),
                Part(
                    "horizontal",
                    "Conv2d",
                    {
                        "in_channels": 5,
                        "out_channels": 8,
                        "kernel_size": (1, 3),
                        "stride": (1, 2),
                        "padding": (0, 1),
                    },
                ),
            ),
        ),
    ),
    left_alone={"0": "it has too few channels", "7": HTML},
)
PRUNING = PlanStep(
    method="channel_pruning",
    mac_ratio=0.66,
    edits=(
        KeepChannels("0", outputs=(0, 1, 2)),
        KeepChannels("1", outputs=(0, 1, 2)),
        KeepChannels("3.vertical", inputs=(0, 1, 2)),
    ),
)
_PLANS = (CompressionPlan((SVD,)), CompressionPlan((SVD, PRUNING)))


def make_synthetic_study(
    folder: Path, model: nn.Module, *, trials: int = 20, name: str = "synthetic", **kinds: bool
) -> CompressionStudy:
    """Make a study.

    Args:
        folder: Its workspace.
        model: The tiny network of the tests, whose plans the trials have.
        trials: Number of finished trials; 0 for a study without any.
        name: Of the study.
        kinds: ``unfinished=True`` adds a finalist, a retry, a running and a waiting trial.
    """
    workspace = Workspace(folder).prepare()
    storage = open_storage(None, workspace)
    with quiet_optuna():
        study = create_study(study_name=name, storage=storage, directions=DIRECTIONS)
        study.set_metric_names(list(METRICS))
        Identity({"name": "tiny"}, SETTINGS, REFERENCE, current_versions()).save(study)
        study.add_trials(_finished(number) for number in range(trials))
        if kinds.get("unfinished"):
            study.add_trials(_others(trials))
    storage.engine.dispose()
    for number in range(trials):
        _write_stages(workspace, model, number)
    return load_study(name, workspace=folder, device="cpu")


def stage_key(number: int, place: int) -> str:
    """The key of a trial's stage; a quarter of the trials share their first half."""
    return content_hash([number // 4 if place < 2 else number, place])


def _results(number: int, gain: float = 0.0) -> tuple[StageResult, ...]:
    first = 0.55 + 0.05 * (number % 9)
    ratio = 0.5 * (1 + (0.05 if number % 10 == INFEASIBLE else 0.019 * math.sin(number)))
    # Better and worse in turn, and slowly better.
    accuracy = 0.9 - 0.06 * abs(math.sin(1.7 * number)) ** 2 - 0.02 / (1 + number / 10)
    steps = (
        ("spatial_svd", first, accuracy - 0.08),
        ("fine_tune", first, accuracy - 0.02),
        ("channel_pruning", ratio, accuracy - 0.05),
        ("fine_tune", ratio, accuracy + gain),
    )
    return tuple(
        StageResult(
            key=stage_key(number, place),
            name=stage,
            accuracy=reached,
            macs=round(kept * REFERENCE.macs),
            params=round(kept * REFERENCE.params),
            mac_ratio=kept,
            seconds=10.0 + place,
            reused=place < 2 and number % 4 > 0,
        )
        for place, (stage, kept, reached) in enumerate(steps)
    )


def _finished(number: int, gain: float = 0.0, **more: Any) -> FrozenTrial:
    kind = number % 10
    stages = _results(number, gain)[: {PRUNED: 2, FAILED: 1}.get(kind, 4)]
    attributes: dict[str, Any] = {"stages": [stage.to_dict() for stage in stages], "recipe": _recipe(number)}
    common = {"params": _params(number), "distributions": dict.fromkeys(_params(number), _RANGE)}
    if kind == PRUNED:
        attributes["reason"] = "after spatial_svd, fine_tune the accuracy is too low"
        return create_trial(state=TrialState.PRUNED, user_attrs=attributes | more, **common)
    if kind == FAILED:
        attributes |= {
            "reason": f"ValueError: {HTML}",
            "traceback": ["File ```x.py```", f"ValueError: {HTML}"],
        }
        return create_trial(state=TrialState.FAIL, user_attrs=attributes | more, **common)
    last = stages[-1]
    attributes |= {"accuracy": last.accuracy, "mac_ratio": last.mac_ratio, "key": last.key, "macs": last.macs}
    attributes["drop"] = REFERENCE.accuracy - last.accuracy
    missed = abs(last.mac_ratio - 0.5) / 0.5 - SETTINGS.tolerance
    return create_trial(
        values=[last.accuracy, last.mac_ratio],
        constraints={CONSTRAINT: missed},
        user_attrs=attributes | more,
        **common,
    )


def _others(trials: int) -> Iterator[FrozenTrial]:
    yield _finished(0, 0.001, finalist_of=0)
    yield _finished(1, -0.001, retry_of=FAILED, retries=1)
    started = {
        "stages": [_results(2)[0].to_dict()],
        "recipe": _recipe(2),
        "learning_curve": [0.8, 0.85],
        HTML: HTML,
    }
    yield create_trial(state=TrialState.RUNNING, user_attrs=started)
    yield create_trial(state=TrialState.WAITING)


_RANGE = FloatDistribution(0.1, 1.0)


def _params(number: int) -> dict[str, float]:
    first, _, last, _ = _results(number)
    return {"c_ssvd": first.mac_ratio, "c_cp": last.mac_ratio / first.mac_ratio}


def _recipe(number: int) -> dict[str, Any]:
    first, second = _params(number).values()
    train = FineTune(epochs=2)
    svd = Compress(method="spatial_svd", mac_ratio=first)
    pruning = Compress(method="channel_pruning", mac_ratio=second)
    return Recipe((svd, train, pruning, train)).to_dict()


def _write_stages(workspace: Workspace, model: nn.Module, number: int) -> None:
    """Write the last stage of a trial, which is the one that is read."""
    results = _results(number)[: {PRUNED: 2, FAILED: 1}.get(number % 10, 4)]
    folder = workspace.stages / results[-1].key
    if folder.exists() or number % 10 == GONE:
        return
    folder.mkdir()
    half, whole = _written(workspace, model)
    shutil.copytree(half if len(results) < 3 else whole, folder, dirs_exist_ok=True)


def _written(workspace: Workspace, model: nn.Module) -> tuple[Path, ...]:
    """The files of the two plans, written once."""
    folders = tuple(workspace.root / "written" / str(place) for place in range(len(_PLANS)))
    for folder, plan in zip(folders, _PLANS, strict=True):
        if not folder.exists():
            folder.mkdir(parents=True)
            plan.save(folder / PLAN)
            save_weights(apply_plan(model, plan), folder / WEIGHTS)
            seal(folder, {"steps": len(plan.steps)})
    return folders
