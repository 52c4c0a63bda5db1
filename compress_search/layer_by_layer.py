"""Compress one layer, or group of coupled channels, after the other, and fine-tune the model after each.

The sizes of all are given. What is done after each layer is stored under a key of its own, the hash of that
layer, its size, and the key before, so that a killed run goes on with the layer that it was at. The user sees
none of these steps: they are removed when the whole stage is stored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import Tensor, nn

from compress_search.compression import apply
from compress_search.fingerprint import content_hash
from compress_search.methods.method import Analysis, Compressed, Sizes
from compress_search.plan import CompressionPlan, Edit, PlanStep
from compress_search.profile import profile_model
from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.results import StageResult
from compress_search.stage_store import StageStore
from compress_search.training.trainer import Trainer

_KEPT = 2
"""How many layers' results lie in the store: should the last be damaged, the one before it is still there."""


@dataclass(frozen=True)
class Tuned:
    """What came of compressing so many layers one by one.

    Attributes:
        model: The model, in evaluation mode.
        step: All that was done, as one step of a plan.
        accuracy: What the last fine-tuning said of the model; ``None`` if there was nothing to compress.
        seconds: What it took, earlier processes included.
        seconds_before: What of that an earlier process took.
    """

    model: nn.Module
    step: PlanStep
    accuracy: float | None
    seconds: float
    seconds_before: float


@dataclass(frozen=True)
class LayerByLayer:
    """One stage that compresses layer by layer.

    Attributes:
        original: The model that the plan begins with, which also teaches. It is not changed.
        example_input: ``(batch, ...)``.
        store: Where layers' results lie meanwhile.
        progress: Where to show the layers.
        trainer: Trains after each layer.
        analysis: The method's view of the model that the stage gets.
        sizes: Sizes by unit name.
        plan: What was done before the stage.
        method: Name of the method.
        key: Of the stage: the hash of everything that makes it.
        lesson: Of the stage; see :meth:`compress_search.training.trainer.Trainer.train`.
    """

    original: nn.Module
    example_input: Tensor
    store: StageStore
    progress: Progress
    trainer: Trainer
    analysis: Analysis
    sizes: Sizes
    plan: CompressionPlan
    method: str
    key: str
    lesson: str

    def run(self, settings: FineTune, batches: Sequence[Tensor]) -> Tuned:
        """Compress in forward order, from the first layer whose result is not stored.

        Args:
            settings: How to train after each layer.
            batches: Calibration inputs, each ``(batch, ...)``; empty for the data-free mode.

        Raises:
            ModelError: Weights or activations are not finite.
            TrainingError: See :func:`compress_search.training.fine_tuning.fine_tune`.
            KeyboardInterrupt: The process was asked to stop; the layers that are done are stored.
        """
        started = time.monotonic()
        units, keys = self._units, self._keys
        done, tuned = self._last_stored()
        if done:
            self.progress.say(f"{self.method}: {done} of {len(units)} layers were done before.")
        with self.progress.bar("layers", len(units), done=done) as advance:
            for number in range(done, len(units)):
                name, size = units[number], self.sizes[units[number]]
                view = self.analysis
                if number:
                    view = view.after(Compressed(tuned.model, tuned.step), self.example_input)
                compressed = apply(view, {name: size}, batches)
                lesson = content_hash([self.lesson, number])
                trained = self.trainer.train(compressed.model, self.original, settings, keys[number], lesson)
                accuracy = trained.accuracy
                step = self._step((*tuned.step.edits, *compressed.step.edits), done=number + 1)
                seconds = tuned.seconds_before + time.monotonic() - started
                tuned = Tuned(compressed.model, step, accuracy, seconds, tuned.seconds_before)
                self._save(keys[number], f"{self.method} of {name}", tuned)
                self.trainer.forget(keys[number])
                for old in keys[: max(0, number + 1 - _KEPT)]:
                    self.store.remove(old)
                advance(f"{name} at size {size}, accuracy {accuracy:.4f}")
                self.trainer.stop_if_requested()
        return tuned

    def forget(self) -> None:
        """Remove what is stored of single layers; for when the stage itself is stored."""
        for key in self._keys:
            self.store.remove(key)

    @cached_property
    def _units(self) -> list[str]:
        """Names of what is to be compressed, in forward order; a full size of channels changes nothing."""
        return [
            unit.name
            for unit in self.analysis.units
            if unit.name in self.sizes and self._costs({unit.name: self.sizes[unit.name]}) != self._costs({})
        ]

    def _costs(self, sizes: Sizes) -> tuple[int, int]:
        return self.analysis.predict_macs(sizes), self.analysis.predict_params(sizes)

    @cached_property
    def _keys(self) -> list[str]:
        """One key a unit."""
        units = [(name, self.sizes[name]) for name in self._units]
        return list(accumulate(units, _key_after, initial=self.key))[1:]

    def _last_stored(self) -> tuple[int, Tuned]:
        """How many layers are done, and what came of them."""
        for done, key in reversed([*enumerate(self._keys, start=1)]):
            result = self.store.find(key)
            if result is not None:
                model, step = self.store.model(key, self.original), self.store.plan(key).steps[-1]
                return done, Tuned(model, step, result.accuracy, result.seconds, result.seconds)
        return 0, Tuned(self.analysis.model, self._step((), done=0), None, 0.0, 0.0)

    def _step(self, edits: tuple[Edit, ...], *, done: int) -> PlanStep:
        macs = self.analysis.predict_macs({name: self.sizes[name] for name in self._units[:done]})
        return PlanStep(self.method, macs / self.analysis.profile.macs, edits, self.analysis.left_alone)

    def _save(self, key: str, name: str, tuned: Tuned) -> None:
        profile = profile_model(tuned.model, self.example_input)
        assert tuned.accuracy is not None
        result = StageResult(
            key=key,
            name=name,
            accuracy=tuned.accuracy,
            macs=profile.macs,
            params=profile.params,
            mac_ratio=profile.macs / profile_model(self.original, self.example_input).macs,
            seconds=tuned.seconds,
        )
        self.store.save(result, self.plan.then(tuned.step), tuned.model, say=self.progress.say)


def _key_after(before: str, unit: tuple[str, int]) -> str:
    name, size = unit
    return content_hash({"before": before, "unit": name, "size": size})
