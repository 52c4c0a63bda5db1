"""Task: the user's side of a study. The model, its data, and how to judge it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compress_search.exceptions import EvaluationError, TaskError
from compress_search.fingerprint import seeded
from compress_search.loaders import (
    BATCHES,
    Batches,
    count_examples,
    inputs_and_targets,
    inputs_of,
    loader_faults,
)
from compress_search.profile import inference_mode_of

Evaluate = Callable[[nn.Module, Iterable[Any]], float]
Loss = Callable[[Tensor, Tensor], Tensor]
Training = Callable[[nn.Module, Any], None]
"""Changes a model's weights in place; the other argument is a training job."""


_CALIBRATION_BATCH = 32
"""Examples a calibration batch: few, so that layer inputs stay small and there are batches to hold out."""


def accuracy(model: nn.Module, loader: Iterable[Any]) -> float:
    """Top-1 accuracy of a classifier, the default of :attr:`Task.evaluate`.

    Args:
        model: Maps inputs ``(batch, ...)`` to logits ``(batch, classes)``, or ``(batch, classes, ...)`` where
            each place has a label.
        loader: Yields ``(inputs, labels)`` with labels ``(batch,)``, or ``(batch, ...)``.

    Returns:
        The share of right answers, in [0, 1].

    Raises:
        ValueError: The outputs are no logits of at least two classes for the labels.
    """
    device = next(model.parameters()).device
    right = total = 0
    with inference_mode_of(model):
        for inputs, labels in loader:
            outputs = model(inputs.to(device))
            _check_classifies(outputs, labels)
            right += int((outputs.argmax(dim=1) == labels.to(device)).sum())
            total += labels.numel()
    return right / total if total else math.nan


def _check_classifies(outputs: Any, labels: Any) -> None:
    """Other shapes would be broadcast against each other, and give a number that means nothing."""
    if isinstance(outputs, Tensor) and isinstance(labels, Tensor) and outputs.ndim > 1:
        batch, classes, *places = outputs.shape
        if classes > 1 and (batch, *places) == tuple(labels.shape):
            return
    seen = [f"{type(one).__name__} {tuple(getattr(one, 'shape', ()))}" for one in (outputs, labels)]
    raise ValueError(
        f"outputs {seen[0]} and labels {seen[1]} are not those of a classifier, which are "
        "(batch, classes, ...) with two classes or more, and (batch, ...). Give the task a function of your "
        "own: Task(evaluate=...)"
    )


def _check_not_compiled(model: nn.Module) -> None:
    """What is compiled does not call its layers one by one: they can be neither watched nor exchanged."""
    for name, module in model.named_modules():
        # What torch.compile returns; its class can only be named by importing all of the compiler.
        wraps = isinstance(getattr(module, "_orig_mod", None), nn.Module)
        # A part that is a script is left alone, as every other layer of an unknown kind.
        if not wraps and (name or not isinstance(module, torch.jit.ScriptModule)):
            continue
        where = f"Its layer {name!r}" if name else "It"
        remedy = "its _orig_mod" if wraps else "the module that it was made of"
        raise TaskError(
            f"Task.model cannot be compressed. {where} is a {type(module).__name__}, which is compiled: its "
            f"layers can be neither watched nor exchanged. Give {remedy}; FineTune(compile=True) compiles "
            "what is fine-tuned."
        )


@dataclass(frozen=True, kw_only=True)
class Task:
    """A trained model and what it takes to compress it.

    A study never changes the model that is given here: everything is done on copies.

    Attributes:
        model: The trained model, or a function without arguments that returns it.
        example_input: ``(batch, ...)``, something ``model(example_input)`` accepts.
        train: Loader of ``(inputs, targets)`` batches for fine-tuning; of inputs alone where it learns from
            the original model only (``fine_tune.distillation`` of 1).
        validation: Loader that the search judges candidates by. The search never sees ``test``.
        test: Loader for the one final number of the chosen model, or ``None``.
        calibration: Loader whose inputs (labels are ignored) the compression methods look at;
            ``train`` by default. They have the shape of ``example_input``; where they are given, those of
            ``train`` may be of another size, if the model takes it.
        evaluate: ``evaluate(model, loader)`` returns a finite number, higher is better. It is called
            with ``validation`` (and once with ``test``). Top-1 accuracy by default.
        loss: ``loss(outputs, targets)`` for fine-tuning. Cross-entropy by default.
        training: ``training(model, job)`` fine-tunes a model in place, by any framework; see
            :class:`compress_search.training.own_function.TrainingJob`. By default the package's own
            :func:`compress_search.training.fine_tuning.fine_tune`. What it does is known by its name: rename
            it, or change ``fine_tune.options``, when it would give other weights than before.
        name: What the task is called in studies and reports.
    """

    model: nn.Module | Callable[[], nn.Module]
    example_input: Tensor
    train: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any] | None = None
    calibration: Iterable[Any] | None = None
    evaluate: Evaluate = accuracy
    loss: Loss = field(default_factory=nn.CrossEntropyLoss)
    training: Training | None = None
    name: str = "task"

    def build_model(self) -> nn.Module:
        """Return a fresh copy of the original model, in evaluation mode.

        Raises:
            TaskError: ``model`` is neither a module nor a function that returns one, cannot be copied, or
                is compiled.
        """
        model = self.model
        if not isinstance(model, nn.Module):
            if not callable(model):
                raise TaskError(
                    f"Task.model is a {type(model).__name__}. "
                    "Give a torch.nn.Module, or a function that returns one."
                )
            try:
                model = model()
            except Exception as error:
                raise TaskError(
                    f"The function given as Task.model raised {type(error).__name__}: {error}. It is called "
                    "without arguments, and returns a torch.nn.Module."
                ) from error
            if not isinstance(model, nn.Module):
                raise TaskError(
                    f"The function given as Task.model returned a {type(model).__name__}, "
                    "not a torch.nn.Module."
                )
        _check_not_compiled(model)
        try:
            return copy.deepcopy(model).eval()
        except Exception as error:
            # Whatever its parts raise; old-style weight normalisation keeps tensors that cannot be copied.
            raise TaskError(
                f"Task.model, a {type(model).__name__}, cannot be copied: {type(error).__name__}: {error}. "
                "Every trial needs a copy of its own. Normalised weights can be made plain ones: "
                "torch.nn.utils.remove_weight_norm(layer)."
            ) from error

    def build_with_example(self) -> tuple[nn.Module, Tensor]:
        """Return what :meth:`build_model` does, and the example input on the device where that lies.

        A network that was trained on a GPU is often given as it lies there, and its data on the CPU.

        Raises:
            TaskError: See :meth:`build_model`.
        """
        model = self.build_model()
        parameter = next(model.parameters(), self.example_input)
        return model, self.example_input.to(parameter.device)

    def score(self, model: nn.Module, loader: Iterable[Any] | None = None) -> float:
        """Evaluate a model, and make sure that the answer is a finite number.

        Args:
            model: The model.
            loader: What to evaluate on; ``validation`` by default.

        Raises:
            EvaluationError: ``evaluate`` raised, or returned NaN, infinity or not a number.
        """
        name = getattr(self.evaluate, "__name__", type(self.evaluate).__name__)
        try:
            value: Any = self.evaluate(model, self.validation if loader is None else loader)
        except Exception as error:
            raise EvaluationError(
                f"evaluate ({name}) raised {type(error).__name__}: {error}. "
                "It is called as evaluate(model, loader) and must return a number, higher is better."
            ) from error
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        try:
            number = math.nan if isinstance(value, str | bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise EvaluationError(
                f"evaluate ({name}) returned {value!r}, which is not a finite number. "
                "Return one number, higher is better (an accuracy in [0, 1], for example)."
            )
        return number

    def standard_error(self, score: float) -> float:
        """How much of a score is the luck of which examples it was taken on.

        Args:
            score: A score on the validation data.

        Returns:
            ``sqrt(score * (1 - score) / n)`` with ``n`` validation examples, the standard error of a share; 0
            for an ``evaluate`` of your own, of which it is not known.
        """
        if self.evaluate is not accuracy:
            return 0.0
        return math.sqrt(max(score * (1 - score), 0.0) / max(self._validation_examples, 1))

    @cached_property
    def _validation_examples(self) -> int:
        return count_examples(self.validation)

    def loss_on(self, device: torch.device) -> Loss:
        """The loss, with what it holds (class weights, for example) on ``device``."""
        return copy.deepcopy(self.loss).to(device) if isinstance(self.loss, nn.Module) else self.loss

    def calibration_inputs(self, samples: int, *, seed: int = 0) -> list[Tensor]:
        """Draw unlabelled inputs for calibration, the same ones for the same seed.

        Args:
            samples: How many examples at most.
            seed: Fixes the order of a shuffling loader.

        Returns:
            Batches ``(batch, ...)`` of at most 32 examples, on the loader's device; ``samples`` examples
            in all or as many as the loader has.

        Raises:
            TaskError: The loader yields no example.
        """
        loader = self.train if self.calibration is None else self.calibration
        batches: list[Tensor] = []
        missing = samples
        with seeded(seed, loader):
            for batch in inputs_of(loader):
                batches += torch.split(batch[:missing], _CALIBRATION_BATCH)
                missing -= min(missing, len(batch))
                if missing <= 0:
                    break
        if not batches:
            raise TaskError(
                "The calibration loader yields no example. Give a loader with at least one batch."
            )
        return batches

    def check(self, model: nn.Module, device: torch.device) -> None:
        """Find what is wrong with the task before any work starts.

        Args:
            model: What :meth:`build_model` returned.
            device: Where the model will run.

        Raises:
            TaskError: With everything that is wrong, one fault a line.
        """
        faults = []
        for name in ("train", "validation", "test", "calibration"):
            loader = getattr(self, name)
            if loader is not None or name in ("train", "validation"):
                judged = name in ("validation", "test") and self.evaluate is not accuracy
                faults += loader_faults(name, loader, Batches.ANY if judged else BATCHES[name])
        for name in ("evaluate", "loss", "training"):
            function = getattr(self, name)
            if not callable(function) and (function is not None or name != "training"):
                faults.append(
                    f"{name} is {function!r}, which cannot be called. Give a function, or leave it out."
                )
        example: object = self.example_input
        if not isinstance(example, Tensor):
            faults.append(f"example_input is a {type(self.example_input).__name__}, not a torch.Tensor.")
        if not faults:
            faults += self._model_faults(model.to(device), device)
        if faults:
            raise TaskError(
                f"The task {self.name!r} cannot be used:\n" + "\n".join(f"  - {f}" for f in faults)
            )

    def _model_faults(self, model: nn.Module, device: torch.device) -> list[str]:
        inputs, targets = inputs_and_targets(next(iter(self.train)))
        # What is fine-tuned on may be of another size (parts of images), if the model takes it.
        source, looked_at = "train", inputs
        if self.calibration is not None:
            source, looked_at = "calibration", next(inputs_of(self.calibration))
        if looked_at.shape[1:] != self.example_input.shape[1:]:
            return [
                f"example_input has shape {tuple(self.example_input.shape)}, but {source} yields inputs "
                f"of shape {tuple(looked_at.shape)}; all but the first number must be equal."
            ]
        with inference_mode_of(model):
            try:
                model(self.example_input.to(device))
            except Exception as error:
                return [
                    f"The model does not run on example_input of shape {tuple(self.example_input.shape)}: "
                    f"{type(error).__name__}: {error}"
                ]
            try:
                outputs = model(inputs.to(device))
                if targets is None:
                    return []
                loss: object = self.loss_on(device)(outputs, targets.to(device))
                value = loss.item() if isinstance(loss, Tensor) and loss.numel() == 1 else math.nan
            except Exception as error:
                of_targets = ""
                if targets is not None:
                    of_targets = f" of shape {tuple(targets.shape)} and type {targets.dtype}"
                return [
                    f"The model's output does not fit train's targets{of_targets}: "
                    f"{type(error).__name__}: {error}"
                ]
        if not math.isfinite(value):
            seen = repr(loss)
            if isinstance(loss, Tensor) and loss.numel() != 1:
                seen = f"a tensor of shape {tuple(loss.shape)}"
            return [f"The loss of the first training batch is {seen}, not a tensor of one finite number."]
        return []
