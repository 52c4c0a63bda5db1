"""What sharing stages saves: trials of a study, and the same trials as separate pipelines, in one process.

Launch it with ``python studies/benchmarks/reuse.py``; ``--network cifar10`` takes ResNet-20 in place of the
digits. A study runs its trials in one workspace, where they find each other's stages and sensitivity tables.
Then each trial's recipe, as the study proposed it, runs in a workspace of its own, which holds nothing. The
pipelines are told their ratios: what it took the study to propose them is time of the study's alone. Both must
come to the same weights, stage by stage, or there is an error and no table.

How much is shared depends on what the trials ask for, so there are three plans:

* ``default``: one study as configured. Its first ratios lie on a grid of 0.05, where few meet.
* ``coarse``: the same on a grid of 0.125, a handful of first ratios as in AIMET's guidebook, each with several
  second ones.
* ``variants``: three studies of a third as many trials that differ in the learning rate of the last
  fine-tuning alone, so that a whole trial up to there is shared.

The tables go to ``runs/benchmarks/reuse-<network>.md`` and ``.csv``. Nothing else is kept: a time that was
measured in parts is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cifar10 import Images, load_cifar10
from cifar10_networks import EXAMPLE, VALIDATION_IMAGES, AugmentedBatches, trained, whole_batches

from benchmarks.ratio_selection import FOLDER
from benchmarks.reuse_table import Comparison, Pipeline, Time, as_csv, as_markdown
from compress_search import FineTune, Task, create_study
from compress_search.config import StudyConfig
from compress_search.progress import Progress
from compress_search.recipe import Recipe
from compress_search.results import StageResult
from compress_search.search.history import STAGES, current_trials
from compress_search.search.settings import SearchSettings
from compress_search.stages import StageRunner
from compress_search.workspace import Workspace

CONFIGURATION = Path(__file__).parents[2] / "configs" / "digits.yaml"
COARSE_STEP = 0.125
LR_FACTORS = (0.5, 1.0, 2.0)
CPU = "cpu"

T = TypeVar("T")


class DifferenceError(RuntimeError):
    """A trial of the study and the pipeline of its own came to different results."""


@dataclass(frozen=True)
class Part:
    """One study of a plan.

    Attributes:
        settings: How it searches.
        n_trials: Its total.
    """

    settings: SearchSettings
    n_trials: int


@dataclass(frozen=True)
class Trial:
    """What a trial of a study did.

    Attributes:
        name: Study and number.
        params: Its ratios.
        recipe: The stages that it came to; a trial that was given up has no more.
        results: Of each of them.
        seconds: Wall time, with what proposing it took.
    """

    name: str
    params: Mapping[str, float]
    recipe: Recipe
    results: tuple[StageResult, ...]
    seconds: float


def plans(settings: SearchSettings, n_trials: int) -> dict[str, tuple[Part, ...]]:
    """The plans by name."""
    variants = tuple(
        replace(settings, final_fine_tune=replace(settings.fine_tune, lr=factor * settings.fine_tune.lr))
        for factor in LR_FACTORS
    )
    return {
        "default": (Part(settings, n_trials),),
        "coarse": (Part(replace(settings, step=COARSE_STEP), n_trials),),
        "variants": tuple(Part(variant, n_trials // len(LR_FACTORS)) for variant in variants),
    }


def run_studies(task: Task, plan: Sequence[Part], workspace: Path) -> list[Trial]:
    """Run the studies of a plan in one workspace."""
    trials = []
    for index, part in enumerate(plan):
        settings = {field.name: getattr(part.settings, field.name) for field in dataclasses.fields(part.settings)}
        study = create_study(f"study-{index}", task, workspace=workspace, device=CPU, **settings)
        study.optimize(part.n_trials)
        for trial in current_trials(study.optuna_study.get_trials(deepcopy=False)):
            results = tuple(map(StageResult.from_dict, trial.user_attrs.get(STAGES, ())))
            recipe = Recipe.from_dict(trial.user_attrs.get("recipe", []))
            seconds = 0.0 if trial.duration is None else trial.duration.total_seconds()
            name = str(trial.number) if len(plan) == 1 else f"{index}.{trial.number}"
            stages = Recipe(recipe.stages[: len(results)])
            trials.append(Trial(name, trial.params, stages, results, seconds))
    return trials


def run_alone(task: Task, recipe: Recipe, *, seed: int, progress: Progress) -> tuple[StageResult, ...]:
    """Run a recipe in a workspace that holds nothing."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder)).prepare()
        runner = StageRunner(task, workspace, seed=seed, device=torch.device(CPU), progress=progress)
        return runner.run(recipe)


def compare(task: Task, plan: Sequence[Part], progress: Progress) -> Comparison:
    """Run a plan both ways.

    Raises:
        DifferenceError: They do not come to the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        trials, shared = timed(partial(run_studies, task, plan, Path(folder)))
    pipelines = []
    alone_of = partial(run_alone, task, seed=plan[0].settings.seed, progress=progress)
    with progress.bar("pipelines", len(trials)) as advance:
        for trial in trials:
            alone, took = timed(partial(alone_of, trial.recipe))
            check_same(trial, alone)
            pipelines.append(Pipeline(trial.name, trial.params, trial.results, trial.seconds, alone, took))
            advance(f"trial {trial.name}: {trial.seconds:.1f} s in the study, {took.seconds:.1f} s alone")
    return Comparison(shared, tuple(pipelines))


def check_same(trial: Trial, alone: Sequence[StageResult]) -> None:
    """Make sure that reuse changed nothing.

    Raises:
        DifferenceError: It did.
    """
    for one, other in zip(trial.results, alone, strict=True):
        for what in ("key", "accuracy", "macs", "params"):
            if getattr(one, what) != getattr(other, what):
                raise DifferenceError(
                    f"Trial {trial.name}, {one.name}: {what} is {getattr(one, what)} in the study and "
                    f"{getattr(other, what)} alone."
                )


def timed(work: Callable[[], T]) -> tuple[T, Time]:
    """Do something; say how long it took."""
    start, cpu_start = time.perf_counter(), time.process_time()
    done = work()
    return done, Time(time.perf_counter() - start, time.process_time() - cpu_start)


def digits() -> tuple[Task, SearchSettings]:
    """The digits study as it is shipped."""
    config = StudyConfig.load(CONFIGURATION)
    return config.load_task(), config.search


def cifar10(images: int, epochs: int) -> tuple[Task, SearchSettings]:
    """ResNet-20 on some of CIFAR-10's training images, for few epochs."""
    train, _ = load_cifar10()
    network = trained("resnet20", train)
    seen, held_out = slice(images), slice(-VALIDATION_IMAGES, None)
    task = Task(
        name="cifar10",
        model=network,
        example_input=EXAMPLE,
        train=AugmentedBatches(Images(train.pixels[seen], train.labels[seen])),
        validation=whole_batches(Images(train.pixels[held_out], train.labels[held_out])),
        calibration=whole_batches(Images(train.pixels[:1_000], train.labels[:1_000])),
    )
    return task, SearchSettings(target=0.5, fine_tune=FineTune(epochs=epochs))


def main() -> None:
    """Compare each plan; print the tables and write them."""
    parser = argparse.ArgumentParser(description="A study with reuse against as many separate pipelines.")
    parser.add_argument("--network", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--plan", choices=("default", "coarse", "variants"), help="this one alone")
    parser.add_argument("--trials", type=int, default=12, help="default 12")
    parser.add_argument("--images", type=int, default=5_120, help="of cifar10, to train on (default 5120)")
    parser.add_argument("--epochs", type=int, default=2, help="of cifar10's fine-tunings (default 2)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default {FOLDER}")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    task, settings = digits() if given.network == "digits" else cifar10(given.images, given.epochs)
    found = {}
    for name, plan in plans(settings, given.trials).items():
        if given.plan in (None, name):
            found[name] = compare(task, plan, Progress())
            text = as_markdown(found, f"{given.network}, {given.trials} trials, one thread.")
            given.folder.mkdir(parents=True, exist_ok=True)
            (given.folder / f"reuse-{given.network}.md").write_text(text)
            (given.folder / f"reuse-{given.network}.csv").write_text(as_csv(found))
    print(text)


if __name__ == "__main__":
    main()
