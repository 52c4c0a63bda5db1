"""What sharing stages saves: trials of a study, and the same trials as separate pipelines, in one process.

Launch it with ``python studies/benchmarks/reuse.py``; ``--network cifar10`` takes ResNet-20 in place of the
digits. A study runs its trials in one workspace, where they find one another's stages and tables. After each
trial its recipe, as the study proposed it, runs in a workspace of its own, which holds nothing: one right
after the other, so that whatever else the machine does troubles both. The pipelines are told their ratios;
what it took the study to propose them is time of the study's alone. Both must come to the same accuracies,
stage by stage, or there is an error and no table.

How much is shared depends on what the trials ask for, so there are five plans:

* ``default``: one study as configured. Its first ratios lie on a grid of 0.05, where few meet.
* ``coarse``: the same on a grid of 0.125, a handful of first ratios as in AIMET's guidebook, each with
  several second ones.
* ``guidebook``: what AIMET's guidebook does, three first ratios and from each network that they leave
  several second ones, with the ``grid`` sampler.
* ``refinement``: its later half, one first ratio and from the network that it leaves as many second ones as
  there are trials. No two trials of this method pair can share more.
* ``variants``: three studies of a third as many trials that differ in the learning rate of the last
  fine-tuning alone, so that a whole trial up to there is shared.

With as many epochs in both fine-tunings, no plan can come below about a half, since pruning and the last
fine-tuning take about as long as what is shared. A search need not train so: ``--first-epochs 15`` gives the
fine-tuning after spatial SVD the 15 epochs of AIMET's guidebook, while the last one stays short, as it may
where the finalists are trained for longer
(:meth:`compress_search.search.compression_study.CompressionStudy.finalize`).

The tables go to ``runs/benchmarks``, as Markdown and as CSV; ``--plan`` runs one plan alone. Nothing else is
kept: a time that was measured in parts is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from optuna.trial import FrozenTrial

sys.path.insert(0, str(Path(__file__).parents[1]))

from cifar10_networks import EXAMPLE
from image_data.cifar10 import load_cifar10
from image_data.images import Images
from image_data.in_memory import AugmentedBatches, whole_batches
from train_baseline import VALIDATION_IMAGES, trained

from benchmarks.ratio_selection import FOLDER
from benchmarks.reuse_table import Comparison, Pipeline, Time, as_csv, as_markdown
from compress_search import CompressionStudy, FineTune, Task, create_study
from compress_search.config import StudyConfig
from compress_search.progress import Progress
from compress_search.recipe import Recipe
from compress_search.results import StageResult
from compress_search.search.history import STAGES, finished_trials
from compress_search.search.settings import SearchSettings
from compress_search.stages import StageRunner
from compress_search.workspace import Workspace

CONFIGURATION = Path(__file__).parents[2] / "configs" / "digits.yaml"
COARSE_STEP = 0.125
FIRST_RATIOS = (0.65, 0.75, 0.85)
SECOND_RATIOS = (0.8, 0.7, 0.6, 0.5)
"""Of the guidebook's plan: so many of them, and in this order, that all first ratios have as many."""
LR_FACTORS = (0.5, 1.0, 2.0)
REFINED_RATIO = 0.75
LARGEST_SECOND, SMALLEST_SECOND = 0.85, 0.5
PLANS = ("default", "coarse", "guidebook", "refinement", "variants")
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


def plans(settings: SearchSettings, n_trials: int) -> dict[str, tuple[Part, ...]]:
    """The plans by name."""
    last = last_fine_tune(settings)
    variants = tuple(
        replace(settings, final_fine_tune=replace(last, lr=factor * last.lr)) for factor in LR_FACTORS
    )
    return {
        "default": (Part(settings, n_trials),),
        "coarse": (Part(replace(settings, step=COARSE_STEP), n_trials),),
        "guidebook": (Part(replace(settings, sampler="grid", grid=crossing(n_trials)), n_trials),),
        "refinement": (Part(replace(settings, sampler="grid", grid=refinement(n_trials)), n_trials),),
        "variants": tuple(Part(variant, n_trials // len(LR_FACTORS)) for variant in variants),
    }


def crossing(n_trials: int) -> dict[str, tuple[float, ...]]:
    """The ratios of at most so many trials: all of the first, each with as many of the second."""
    of_each = max(1, n_trials // len(FIRST_RATIOS))
    return {"c_ssvd": FIRST_RATIOS, "c_cp": SECOND_RATIOS[:of_each]}


def refinement(n_trials: int) -> dict[str, tuple[float, ...]]:
    """One first ratio, and as many second ones, evenly from the largest to the smallest."""
    seconds = torch.linspace(LARGEST_SECOND, SMALLEST_SECOND, n_trials, dtype=torch.float64)
    return {"c_ssvd": (REFINED_RATIO,), "c_cp": tuple(round(second, 4) for second in seconds.tolist())}


def compare(task: Task, plan: Sequence[Part], progress: Progress) -> Comparison:
    """Run a plan both ways, each trial alone right after it ran in its study.

    Raises:
        DifferenceError: They do not come to the same.
    """
    total = sum(part.n_trials for part in plan)
    creation, pipelines = Time(0.0, 0.0), []
    with tempfile.TemporaryDirectory() as folder, progress.bar("pipelines", total) as advance:
        for index, part in enumerate(plan):
            study, took = timed(partial(new_study, f"study-{index}", task, part.settings, Path(folder)))
            creation += took
            for n_trials in range(1, part.n_trials + 1):
                _, took = timed(partial(study.optimize, n_trials, progress=progress))
                trial = finished_trials(study.optuna_study.get_trials(deepcopy=False))[-1]
                name = str(trial.number) if len(plan) == 1 else f"{index}.{trial.number}"
                pipeline = run_alone(task, name, trial, took, seed=part.settings.seed, progress=progress)
                check_same(pipeline)
                pipelines.append(pipeline)
                alone = pipeline.alone_time.seconds
                advance(f"trial {name}: {took.seconds:.1f} s in the study, {alone:.1f} s alone")
    return Comparison(creation, tuple(pipelines))


def new_study(name: str, task: Task, settings: SearchSettings, workspace: Path) -> CompressionStudy:
    """Create a study with these settings."""
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return create_study(name, task, workspace=workspace, device=CPU, **given)


def run_alone(
    task: Task, name: str, trial: FrozenTrial, shared_time: Time, *, seed: int, progress: Progress
) -> Pipeline:
    """Run what a trial ran in a workspace that holds nothing.

    Args:
        task: The task.
        name: What the trial is called.
        trial: A trial that has ended; of one that was given up, the stages that it came to are run.
        shared_time: What it took in its study.
        seed: The study's seed.
        progress: Where to show the stages.
    """
    shared = tuple(map(StageResult.from_dict, trial.user_attrs.get(STAGES, ())))
    recipe = Recipe.from_dict(trial.user_attrs.get("recipe", []))
    with tempfile.TemporaryDirectory() as folder:

        def pipeline() -> tuple[StageResult, ...]:
            workspace = Workspace(Path(folder)).prepare()
            runner = StageRunner(task, workspace, seed=seed, device=torch.device(CPU), progress=progress)
            return runner.run(Recipe(recipe.stages[: len(shared)]))

        alone, alone_time = timed(pipeline)
    return Pipeline(name, trial.params, shared, shared_time, alone, alone_time)


def check_same(pipeline: Pipeline) -> None:
    """Make sure that reuse changed nothing.

    Raises:
        DifferenceError: It did.
    """
    for one, other in zip(pipeline.shared, pipeline.alone, strict=True):
        for what in ("key", "accuracy", "macs", "params"):
            if getattr(one, what) != getattr(other, what):
                raise DifferenceError(
                    f"Trial {pipeline.name}, {one.name}: {what} is {getattr(one, what)} in the study and "
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


def with_first_epochs(settings: SearchSettings, epochs: int) -> SearchSettings:
    """Let the fine-tuning after spatial SVD have so many epochs, and the last one as many as before."""
    first = replace(settings.fine_tune, epochs=epochs)
    return replace(settings, fine_tune=first, final_fine_tune=last_fine_tune(settings))


def last_fine_tune(settings: SearchSettings) -> FineTune:
    """How a trial ends."""
    return settings.final_fine_tune or settings.fine_tune


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
    parser.add_argument("--plan", choices=PLANS, help="this one alone")
    parser.add_argument("--trials", type=int, default=12, help="default 12")
    parser.add_argument("--images", type=int, default=5_120, help="of cifar10, to train on (default 5120)")
    parser.add_argument("--epochs", type=int, default=2, help="of cifar10's fine-tunings (default 2)")
    parser.add_argument("--first-epochs", type=int, help="of the first fine-tuning (default: as the last)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default {FOLDER}")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    task, settings = digits() if given.network == "digits" else cifar10(given.images, given.epochs)
    stem = f"reuse-{given.network}" + (f"-{given.plan}" if given.plan else "")
    if given.first_epochs is not None:
        settings = with_first_epochs(settings, given.first_epochs)
        stem += f"-first-{given.first_epochs}"
    head = (
        f"{given.network}, {given.trials} trials, {settings.fine_tune.epochs} epochs after spatial SVD and "
        f"{last_fine_tune(settings).epochs} at the end, one thread."
    )
    found = {}
    for name, plan in plans(settings, given.trials).items():
        if given.plan in (None, name):
            found[name] = compare(task, plan, Progress())
            text = as_markdown(found, head)
            given.folder.mkdir(parents=True, exist_ok=True)
            (given.folder / f"{stem}.md").write_text(text)
            (given.folder / f"{stem}.csv").write_text(as_csv(found))
    print(text)


if __name__ == "__main__":
    main()
