"""Fine-tuning: train a compressed model on, taught by the original, and keep its best epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from compress_search.exceptions import TrainingError
from compress_search.fingerprint import content_hash, seeded
from compress_search.profile import inference_mode_of
from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.task import Task
from compress_search.training.distillation import distillation_loss


def fine_tune(
    model: nn.Module,
    teacher: nn.Module | None,
    task: Task,
    settings: FineTune,
    *,
    seed: int,
    progress: Progress,
) -> float:
    """Train a model in place, on the device where it lies, and leave it with its best weights.

    The model is evaluated before the first epoch and after each one. The weights and batch normalisation
    statistics of the best evaluation are kept, those it came with included, so it never ends with a lower
    score than it began with. Of equal evaluations the last one stays: it was trained the longest, at the
    lowest learning rate.

    Every epoch draws its random numbers from a seed of its own. The same call therefore gives the same
    bits on a CPU, and an epoch does not depend on what was drawn before it.

    Args:
        model: The model to train. It is left in evaluation mode.
        teacher: The original model, on the same device, for distillation; ``None`` for none. It is not
            changed.
        task: Gives the training data, the loss and the evaluation.
        settings: How to train; with 0 epochs the model is only evaluated.
        seed: Fixes the order of the data, its augmentation and dropout.
        progress: Where to show the epochs.

    Returns:
        What ``task.score(model)`` says of the weights that were kept.

    Raises:
        TrainingError: The loss is not finite or cannot take what the model returns in training, no parameter
            can be trained, or the model's output cannot be distilled.
    """
    if settings.epochs == 0:
        return task.score(model.eval())
    best_score, best_state = _evaluate(model, task, _epoch_seed(seed, 0)), _copy_of_state(model)
    training = _Training(model, teacher, task, settings)
    with progress.bar("epochs", settings.epochs) as advance:
        for epoch in range(settings.epochs):
            epoch_seed = _epoch_seed(seed, epoch + 1)
            with seeded(epoch_seed, task.train):
                loss = training.run_epoch(epoch)
            score = _evaluate(model, task, epoch_seed)
            if score >= best_score:
                best_score, best_state = score, _copy_of_state(model)
            advance(f"accuracy {score:.4f}, loss {loss:.4f}")
    model.load_state_dict(best_state)
    model.eval()
    return best_score


def learning_rate_factor(step: int, steps: int, *, warmup: float) -> float:
    """The learning rate of one step, as a part of the highest one.

    With ``w = round(warmup * steps)``, the factor rises linearly, ``(step + 1) / (w + 1)``, for the first
    ``w`` steps and then falls as ``(1 + cos(pi * (step - w) / (steps - w))) / 2`` (Loshchilov & Hutter
    2017, equation 5, without restarts). It is 1 at step ``w`` and nowhere 0.

    Args:
        step: Number of the step, from 0.
        steps: Number of all steps.
        warmup: Share of the steps that rise, in [0, 1).

    Returns:
        A number in (0, 1].
    """
    rising = min(round(warmup * steps), steps - 1)
    if step < rising:
        return (step + 1) / (rising + 1)
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


class _Training:
    """The state that lives from one epoch to the next: the optimiser and its momentum."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None, task: Task, settings: FineTune) -> None:
        self._model, self._loader, self._settings = model, task.train, settings
        self._teacher = teacher if settings.distillation > 0 else None
        self._steps_per_epoch = _count_batches(task.train)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self._parameters:
            raise TrainingError(
                f"No parameter of {type(model).__name__} requires a gradient, so nothing can be trained. "
                "Call model.requires_grad_() in the task, or set fine_tune.epochs to 0."
            )
        self._device = self._parameters[0].device
        self._task_loss = task.loss_on(self._device)
        self._optimiser = torch.optim.SGD(
            _decay_groups(self._parameters, settings.weight_decay),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
        )

    def run_epoch(self, epoch: int) -> float:
        """Train on every batch once and return the mean loss."""
        settings, device = self._settings, self._device
        total, steps = torch.zeros((), device=device), 0
        self._model.train()
        for steps, (inputs, targets, *_) in enumerate(self._loader, start=1):
            self._set_learning_rate(epoch * self._steps_per_epoch + steps - 1)
            loss = self._loss(inputs.to(device), targets.to(device))
            self._optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self._parameters, settings.gradient_clip)
            self._optimiser.step()
            total += loss.detach()
        # Looked at once an epoch: reading it at every step would make a GPU wait for each.
        mean = total.item() / max(steps, 1)
        if not math.isfinite(mean):
            raise TrainingError(
                f"The loss of epoch {epoch + 1} is {mean}. Lower fine_tune.lr (it is {settings.lr:g}) "
                f"or fine_tune.gradient_clip (it is {settings.gradient_clip:g})."
            )
        return mean

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = self._model(inputs)
        try:
            loss = self._task_loss(outputs, targets)
        except Exception as error:
            if isinstance(outputs, Tensor):
                raise
            raise TrainingError(
                f"In training, {type(self._model).__name__} returns a {type(outputs).__name__}, which the "
                f"task's loss cannot take ({type(error).__name__}: {error}). Give Task(loss=...) a function "
                "that takes what the model returns in training and what it returns in evaluation."
            ) from error
        if self._teacher is None:
            return loss
        with inference_mode_of(self._teacher):
            taught = self._teacher(inputs)
        if isinstance(outputs, tuple):
            # With auxiliary heads, the main output comes first; the original is asked for that alone.
            outputs = outputs[0]
        if not isinstance(outputs, Tensor) or not isinstance(taught, Tensor) or outputs.shape != taught.shape:
            raise TrainingError(
                f"A model that returns a {type(outputs).__name__} cannot be distilled from an original that "
                f"returns a {type(taught).__name__}; both must return one tensor of the same shape. "
                "Set fine_tune.distillation to 0."
            )
        weight, temperature = self._settings.distillation, self._settings.temperature
        return (1 - weight) * loss + weight * distillation_loss(
            outputs, taught, targets, temperature=temperature
        )

    def _set_learning_rate(self, step: int) -> None:
        steps = self._settings.epochs * self._steps_per_epoch
        factor = learning_rate_factor(min(step, steps - 1), steps, warmup=self._settings.warmup)
        for group in self._optimiser.param_groups:
            group["lr"] = self._settings.lr * factor


def _evaluate(model: nn.Module, task: Task, seed: int) -> float:
    with seeded(seed, task.validation):
        return task.score(model)


def _copy_of_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(content_hash([seed, epoch])[:8], 16)


def _count_batches(loader: Iterable[Any]) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        with seeded(0, loader):
            return sum(1 for _ in loader)


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Exempt biases and normalisation (parameters of one axis) from weight decay."""
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
