"""Run a recipe stage by stage: the only stage loop.

A stage's key is the hash of everything that made it: the original model, the data, the seed, its own
settings, and the key of the stage before. A stage whose key is in the store is not computed again, whichever
trial, process or study computed it. That one mechanism gives reuse between trials and resume after a crash.
Two ratios may lead to the same sizes of all layers: then the stage of the second one is that of the first.
While a process computes a stage it holds a lease on it, so that others wait for the result.

The training data of a fine-tuning follow from the study's seed and the stage's place in its recipe, so that
all trials see the same batches: they are compared on equal terms, and the original, which teaches, is asked
about each batch once.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from compress_search.compression import TableSource, analyse, apply, choose_sizes, stored_table
from compress_search.fingerprint import content_hash, data_fingerprint, model_fingerprint, seeded
from compress_search.function_identity import function_identity, name_of
from compress_search.layer_by_layer import LayerByLayer
from compress_search.leases import Leases
from compress_search.memory_layout import in_quickest_layout
from compress_search.methods.kept_channels import channels_to_keep
from compress_search.methods.method import Analysis, Sizes
from compress_search.plan import CompressionPlan
from compress_search.profile import profile_model
from compress_search.progress import Progress
from compress_search.recipe import Compress, FineTune, Recipe, Stage, stage_to_dict
from compress_search.results import Reference, StageResult
from compress_search.selection import SELECTORS
from compress_search.selection.table import SensitivityTable
from compress_search.selection.table_store import TableStore
from compress_search.stage_store import StageStore
from compress_search.stopping import StopSwitch
from compress_search.task import Task
from compress_search.training.trained import Trained
from compress_search.training.trainer import CHECKPOINT_SECONDS, Trainer
from compress_search.workspace import Workspace

_STAGE_FORMAT = 9
"""Part of every key. Raise it when the same settings would give other weights than before."""

_TABLE_DEPENDS_ON = ("validation", "calibration", "evaluate", "seed")
"""What of a runner's identity a sensitivity table depends on, beside the model itself."""

AfterStage = Callable[[Stage, StageResult], None]
AfterEpoch = Callable[[Sequence[float]], None]


@dataclasses.dataclass(frozen=True)
class _Compression:
    """A compressing stage whose sizes are chosen.

    Attributes:
        stage: Its settings.
        key: Hash of all that makes it.
        lesson: Of fine-tuning after each layer; see :meth:`compress_search.training.trainer.Trainer.train`.
        plan: What was done before.
        analysis: The method's view of the model that the stage gets.
        sizes: Sizes by unit name.
        started: When the stage began, by the monotonic clock.
    """

    stage: Compress
    key: str
    lesson: str
    plan: CompressionPlan
    analysis: Analysis
    sizes: Sizes
    started: float


class StageRunner:
    """Runs recipes on one task.

    Args:
        task: The user's side.
        workspace: Where finished stages lie.
        seed: Fixes the calibration samples and all randomness of fine-tuning.
        device: Where models run.
        progress: Where to show the stages.
        checkpoint_seconds: A fine-tuning leaves a checkpoint so often, and after each epoch.
        stop: Says when to stop.
    """

    def __init__(
        self,
        task: Task,
        workspace: Workspace,
        *,
        seed: int,
        device: torch.device,
        progress: Progress,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        stop: StopSwitch | None = None,
    ) -> None:
        self._task = task
        self._trainer = Trainer(task, workspace, progress, checkpoint_seconds, stop or StopSwitch())
        self._store = StageStore(workspace)
        self._leases = Leases(workspace.stages, progress.say)
        self._tables = TableStore(workspace)
        self._seed = seed
        self._progress = progress
        self._original = task.build_model().to(device)
        self._example = task.example_input.to(device)
        self._calibration: dict[int, list[Tensor]] = {}

    @property
    def reference(self) -> Reference:
        """The original model's numbers; measured once and stored."""
        return Reference(self.original.accuracy, self.original.macs, self.original.params)

    @cached_property
    def original(self) -> StageResult:
        """The original model as the stage before the first."""
        key = content_hash(self.identity)
        if (stored := self._store.find(key)) is not None:
            return stored
        with self._leases.computing(key, "original", partial(self._store.find, key)) as stored:
            return stored or self._finish(
                key, "original", CompressionPlan(), self._original, started=time.monotonic()
            )

    def run(
        self,
        recipe: Recipe,
        *,
        after_stage: AfterStage | None = None,
        after_epoch: AfterEpoch | None = None,
    ) -> tuple[StageResult, ...]:
        """Run a recipe, reusing every stage that is stored.

        Args:
            recipe: What to do.
            after_stage: Called after each stage; what it raises ends the run. Stages that are finished
                stay stored.
            after_epoch: Called after each epoch of a fine-tuning stage with the accuracy before the first one
                and after each; what it raises ends the run.

        Returns:
            One result a stage.
        """
        results: list[StageResult] = []
        before = self.original
        model: nn.Module | None = None
        with self._progress.bar("stages", len(recipe.stages)) as advance:
            for place, stage in enumerate(recipe.stages):
                result, model = self._reuse_or_compute(stage, place, before, model, after_epoch)
                results.append(result)
                note = "reused" if result.reused else f"{result.seconds:.1f} s"
                advance(
                    f"{stage.name}, accuracy {result.accuracy:.4f}, mac_ratio {result.mac_ratio:.4f}, {note}"
                )
                before = result
                if after_stage is not None:
                    after_stage(stage, result)
                # A training function of the user's own need not have looked; what it did is stored by now.
                self._trainer.stop_if_requested()
        return tuple(results)

    def _reuse_or_compute(
        self,
        stage: Stage,
        place: int,
        before: StageResult,
        model: nn.Module | None,
        after_epoch: AfterEpoch | None,
    ) -> tuple[StageResult, nn.Module | None]:
        """Do one stage; ``model`` is the one before it, if that is at hand."""
        key = _key(before, stage)
        find = partial(self._store.find_asked if isinstance(stage, Compress) else self._store.find, key)
        stored = find()
        if stored is None:
            with self._leases.computing(key, stage.name, find) as stored:
                if stored is None:
                    model = self._stored_model(before) if model is None else model
                    return self._compute(stage, place, key, before, model, after_epoch)
        assert stored is not None
        # The model of a stored stage is read only if a later stage has to be computed.
        return dataclasses.replace(stored, reused=True), None

    def achieved_ratio(self, stages: Sequence[Stage]) -> float:
        """The exact MAC ratio, relative to the original, after stages that end with a compressing one.

        The last stage itself is not computed: its sizes are chosen and its MACs predicted. The stages
        before it are run, or reused.

        Raises:
            RatioError: The ratio cannot be reached.
        """
        *earlier, last = stages
        assert isinstance(last, Compress)
        before = self.run(Recipe(tuple(earlier)))[-1] if earlier else self.original
        stored = self._store.find_asked(_key(before, last))
        if stored is not None:
            return stored.mac_ratio
        model, plan = self._stored_model(before), self._stored_plan(before)
        analysis, sizes = self._choose_sizes(last, model, plan)
        return analysis.predict_macs(sizes) / self.original.macs

    def stored_tables(
        self, recipe: Recipe, results: Sequence[StageResult]
    ) -> tuple[tuple[Compress, SensitivityTable], ...]:
        """Read the sensitivity tables by which the sizes of finished stages were chosen; measure nothing.

        Args:
            recipe: The stages.
            results: What the finished ones of them left, in order.

        Returns:
            Each compressing stage that has a table in the workspace, and the table.

        Raises:
            WorkspaceError: A stage before is gone or damaged.
        """
        tables = []
        before = self.original
        for stage, result in zip(recipe.stages, results, strict=False):
            if isinstance(stage, Compress) and SELECTORS[stage.selection].needs_table:
                model, plan = self._stored_model(before), self._stored_plan(before)
                here = self._for_model(stage, plan)
                table = stored_table(analyse(model, self._example, here), here, self._table_source(()))
                if table.cells:
                    tables.append((stage, table))
            before = result
        return tuple(tables)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the results depend on beside the recipe: fingerprints, names and the seed."""
        task = self._task
        train = data_fingerprint(task.train)
        return {
            "format": _STAGE_FORMAT,
            "model": model_fingerprint(self._original),
            "train": train,
            "validation": data_fingerprint(task.validation),
            "calibration": train if task.calibration is None else data_fingerprint(task.calibration),
            "evaluate": function_identity(task.evaluate),
            "loss": function_identity(task.loss),
            "seed": self._seed,
            # Only where there is one: it is younger than the stages of other tasks.
            **({} if task.training is None else {"training": name_of(task.training)}),
        }

    def _compute(
        self,
        stage: Stage,
        place: int,
        key: str,
        before: StageResult,
        model: nn.Module,
        after_epoch: AfterEpoch | None,
    ) -> tuple[StageResult, nn.Module | None]:
        started = time.monotonic()
        plan, lesson = self._stored_plan(before), self._lesson(place)
        if isinstance(stage, Compress):
            analysis, sizes = self._choose_sizes(stage, model, plan)
            asked, key = key, _key_of_sizes(before, stage, sizes)
            if (same := self._store.find(key)) is not None:
                self._store.note(asked, key, say=self._progress.say)
                return dataclasses.replace(same, reused=True), None
            compression = _Compression(stage, key, lesson, plan, analysis, sizes, started)
            result, compressed = self._compress(compression)
            self._store.note(asked, key, say=self._progress.say)
            return result, compressed
        changed = copy.deepcopy(model)
        trained = self._trainer.train(changed, self._original, stage, key, lesson, after_epoch=after_epoch)
        result = self._finish(key, stage.name, plan, changed, started=started, trained=trained)
        self._trainer.forget(key)
        return result, changed

    def _stored_model(self, before: StageResult) -> nn.Module:
        # The original is at hand, so that damage to what is stored of it stands in no trial's way.
        if before.key == self.original.key:
            return copy.deepcopy(self._original).eval()
        return self._store.model(before.key, self._original)

    def _stored_plan(self, before: StageResult) -> CompressionPlan:
        return CompressionPlan() if before.key == self.original.key else self._store.plan(before.key)

    def _lesson(self, place: int) -> str:
        """Hash of the original, the training data, and where in its recipe a stage sees them."""
        return content_hash([self.identity[name] for name in ("model", "train", "seed")] + [place])

    def _compress(self, this: _Compression) -> tuple[StageResult, nn.Module | None]:
        if this.stage.per_layer_fine_tune is None:
            compressed = apply(this.analysis, this.sizes, self._calibration_inputs(this.stage.samples))
            plan = this.plan.then(compressed.step)
            result = self._finish(this.key, this.stage.name, plan, compressed.model, started=this.started)
            return result, compressed.model
        # Another ratio may lead here too, and two processes must not share the checkpoints on the way.
        with self._leases.computing(this.key, this.stage.name, partial(self._store.find, this.key)) as same:
            if same is not None:
                return dataclasses.replace(same, reused=True), None
            return self._compress_layer_by_layer(this, this.stage.per_layer_fine_tune)

    def _compress_layer_by_layer(
        self, this: _Compression, settings: FineTune
    ) -> tuple[StageResult, nn.Module]:
        layers = LayerByLayer(
            original=self._original,
            example_input=self._example,
            store=self._store,
            progress=self._progress,
            trainer=self._trainer,
            analysis=this.analysis,
            sizes=this.sizes,
            plan=this.plan,
            method=this.stage.method,
            key=this.key,
            lesson=this.lesson,
        )
        tuned = layers.run(settings, self._calibration_inputs(this.stage.samples))
        result = self._finish(
            this.key,
            this.stage.name,
            this.plan.then(tuned.step),
            tuned.model,
            started=this.started - tuned.seconds_before,
            accuracy=tuned.accuracy,
        )
        layers.forget()
        return result, tuned.model

    def _choose_sizes(
        self, stage: Compress, model: nn.Module, plan: CompressionPlan
    ) -> tuple[Analysis, Sizes]:
        stage = self._for_model(stage, plan)
        analysis = analyse(model, self._example, stage)
        source = self._table_source(self._calibration_inputs(stage.samples))
        return analysis, choose_sizes(analysis, stage, source)

    def _for_model(self, stage: Compress, plan: CompressionPlan) -> Compress:
        # The user named channels of the original model; methods speak of the model that they are given.
        named = channels_to_keep(stage.keep_channels, self._original)
        kept = dict(plan.outputs_after(layer, channels) for layer, channels in named.items())
        return dataclasses.replace(stage, keep_channels=kept)

    def _table_source(self, calibration: Sequence[Tensor]) -> TableSource:
        return TableSource(
            calibration,
            data=content_hash({name: self.identity[name] for name in _TABLE_DEPENDS_ON}),
            score=self._task.score,
            store=self._tables,
            progress=self._progress,
        )

    def _finish(
        self,
        key: str,
        name: str,
        plan: CompressionPlan,
        model: nn.Module,
        *,
        started: float,
        accuracy: float | None = None,
        trained: Trained | None = None,
    ) -> StageResult:
        """Measure a model and store it as the outcome of a stage; its accuracy may be known already."""
        profile = profile_model(model, self._example)
        original_macs = profile.macs if name == "original" else self.original.macs
        if accuracy is None:
            # One seed for all: where a loader shuffles and drops the rest, the same examples judge all.
            with seeded(self._seed, self._task.validation):
                accuracy = self._task.score(model)
        result = StageResult(
            key=key,
            name=name,
            accuracy=accuracy,
            macs=profile.macs,
            params=profile.params,
            mac_ratio=profile.macs / original_macs,
            seconds=time.monotonic() - started,
            learning_curve=() if trained is None else trained.learning_curve,
            teacher_seconds_saved=0.0 if trained is None else trained.teacher_seconds_saved,
        )
        self._store.save(result, plan, model, say=self._progress.say)
        return result

    def _calibration_inputs(self, samples: int) -> list[Tensor]:
        if samples == 0:
            return []
        if samples not in self._calibration:
            inputs = self._task.calibration_inputs(samples, seed=self._seed)
            self._calibration[samples] = in_quickest_layout(self._original, inputs)
        return self._calibration[samples]


def _key(before: StageResult, stage: Stage) -> str:
    """Hash of all that makes a stage; of a compressing one, of all that decides about its sizes."""
    return content_hash({"before": before.key, "stage": stage_to_dict(stage)})


def _key_of_sizes(before: StageResult, stage: Compress, sizes: Sizes) -> str:
    """Hash of all that makes a compressing stage: the sizes that were chosen, not the ratio.

    What comes after, its seed too, follows from this one. So a trial comes to the same whether or not another
    one, which asked for a little more or less, has been there before.
    """
    settings = {name: value for name, value in stage_to_dict(stage).items() if name != "mac_ratio"}
    return content_hash({"before": before.key, "stage": settings, "sizes": dict(sizes)})
