"""Training by a function of the user's own, in place of the package's.

The contract is one call: ``training(model, job)`` changes the weights of ``model``, which it is given in
training mode, in place. Any framework will do; ``studies/lightning_training.py`` does it with Lightning. What
surrounds the call stays as it is: the stage is stored under the hash of everything that made it, reused by
other trials, and evaluated by the task.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress_search.exceptions import TrainingError
from compress_search.fingerprint import seeded
from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.stopping import StopSwitch
from compress_search.task import Task
from compress_search.training.trained import Trained
from compress_search.workspace import write_json_atomically

_CURVE = "learning_curve.json"


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What a training function is to do, and with what.

    Attributes:
        original: The uncompressed model on the same device, in evaluation mode, as a teacher. It must not be
            changed.
        task: Its ``train`` and ``validation`` loaders, ``task.loss_on(job.device)`` and
            ``task.score(model)``.
        settings: The stage's settings; ``settings.epochs`` and ``settings.lr`` are what the search chose, and
            ``settings.options`` holds whatever else the user wrote.
        seed: Every random source is seeded with it when the function is called; for those that the function
            has of its own.
        device: Where the model is, and has to be in the end.
        folder: A folder for checkpoints, empty at first, which the same job finds again after it was killed.
            It is removed when the stage is stored. ``learning_curve.json`` in it is the package's.
        progress: ``progress.bar("epochs", n)`` draws a bar and writes to the log; ``progress.say(text)``.
        stop_requested: Whether Ctrl-C was pressed or SIGTERM came. Ask after each step; if so, leave a
            checkpoint in ``folder`` and raise :class:`KeyboardInterrupt`. A second Ctrl-C raises it at once.
            Where the function does not ask, the process stops when what it returned is stored.
        epoch_done: ``epoch_done(epoch, accuracy)`` tells, after each epoch, its number from 1 on and what
            ``task.score(model)`` says then. Who calls it has a learning curve, and trials that
            ``median_stopping`` can give up: it then raises an exception that the function must let pass.
            Epochs that are trained again after a resume are told again; one that was not told counts as the
            one before it.
    """

    original: nn.Module
    task: Task
    settings: FineTune
    seed: int
    device: torch.device
    folder: Path
    progress: Progress
    stop_requested: Callable[[], bool]
    epoch_done: Callable[[int, float], None]


class _LearningCurve:
    """What a function tells of its epochs. It outlives the process, as the function's checkpoints do.

    Args:
        file: Where it is kept.
        before: The accuracy before the first epoch.
        epochs: How many there are to be.
        after_epoch: Called with the curve so far; what it raises is kept as ``ended_by``.

    Attributes:
        ended_by: Why no further epoch is wanted, if so.
    """

    def __init__(
        self,
        file: Path,
        before: float,
        epochs: int,
        after_epoch: Callable[[Sequence[float]], None] | None,
    ) -> None:
        self._file, self._epochs, self._after_epoch = file, epochs, after_epoch
        self._curve = [before, *_stored_curve(file)]
        self.ended_by: Exception | None = None

    def epoch_done(self, epoch: int, accuracy: float) -> None:
        """Note the accuracy after an epoch; it replaces what was told of it and of later ones."""
        if not 1 <= epoch <= self._epochs:
            raise ValueError(
                f"epoch_done({epoch}, {accuracy!r}): epochs are counted from 1 to settings.epochs, which is "
                f"{self._epochs}."
            )
        if not math.isfinite(accuracy):
            raise ValueError(f"epoch_done({epoch}, {accuracy!r}): the accuracy must be a finite number.")
        # Killed after its checkpoint and before it told of the epoch, a function goes on with the next one.
        untold = [self._curve[-1]] * (epoch - len(self._curve))
        self._curve[epoch:] = [*untold, float(accuracy)]
        write_json_atomically(self._file, self._curve[1:])
        if self._after_epoch is not None:
            try:
                self._after_epoch(self._curve)
            except Exception as error:
                self.ended_by = error
                raise

    @property
    def told(self) -> tuple[float, ...]:
        """The accuracy before the first epoch and after each; empty where no epoch was told."""
        return tuple(self._curve) if len(self._curve) > 1 else ()


def _stored_curve(file: Path) -> list[float]:
    """What was told before the process was killed; nothing if that cannot be read."""
    try:
        return [float(accuracy) for accuracy in json.loads(file.read_text(encoding="utf-8"))]
    except (FileNotFoundError, ValueError, TypeError):
        return []


def train_by(
    model: nn.Module,
    original: nn.Module,
    task: Task,
    settings: FineTune,
    *,
    seed: int,
    progress: Progress,
    folder: Path,
    stop: StopSwitch,
    after_epoch: Callable[[Sequence[float]], None] | None = None,
) -> Trained:
    """Call the task's training function, and keep what came of it unless the model is clearly worse.

    Args:
        model: The model to train in place. It is left in evaluation mode.
        original: See :class:`TrainingJob`, also for the others.
        task: Has a training function.
        settings: The stage's settings; with 0 epochs the model is only evaluated.
        seed: Of the stage.
        progress: Where to show it.
        folder: For the function's checkpoints.
        stop: Says when to stop.
        after_epoch: Called with the learning curve when the function tells of an epoch. What it raises ends
            the training, and is raised here whatever the function makes of it.

    Returns:
        What ``task.score(model)`` says of the weights that were kept, and the epochs that were told.

    Raises:
        TrainingError: The function raised, or left the model with other tensors than it was given, on another
            device, or with weights that are not finite.
        EvaluationError: See :meth:`compress_search.task.Task.score`.
    """
    assert task.training is not None

    def score() -> float:
        # The same examples, if the validation draws some of them, before and after.
        with seeded(seed, task.validation):
            return task.score(model.eval())

    before = score()
    if settings.epochs == 0:
        return Trained(before)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    device = next(model.parameters()).device
    folder.mkdir(parents=True, exist_ok=True)
    curve = _LearningCurve(folder / _CURVE, before, settings.epochs, after_epoch)
    job = TrainingJob(
        original=original,
        task=task,
        settings=settings,
        seed=seed,
        device=device,
        folder=folder,
        progress=progress,
        stop_requested=lambda: stop.requested,
        epoch_done=curve.epoch_done,
    )
    name = getattr(task.training, "__name__", type(task.training).__name__)
    with seeded(seed, task.train), stop.finishing():
        try:
            task.training(model.train(), job)
        except Exception as error:
            if curve.ended_by is not None:
                raise curve.ended_by from None
            raise TrainingError(f"Task.training ({name}) raised {type(error).__name__}: {error}") from error
    if curve.ended_by is not None:
        raise curve.ended_by
    if fault := _fault_of(model.state_dict(), state, device):
        raise TrainingError(
            f"Task.training ({name}) {fault}. It is to change the weights of "
            "the model in place, and nothing else."
        )
    # A layer that the function froze is for the next stage as it would be if it were read from the disk.
    for parameter, requires_grad in zip(model.parameters(), trainable, strict=True):
        parameter.requires_grad_(requires_grad)
    after = score()
    if after < before - task.standard_error(before):
        model.load_state_dict(state)
        progress.say(
            f"{name} made the model worse ({before:.4f} before, {after:.4f} after): it is left as it was."
        )
        return Trained(before, curve.told)
    return Trained(after, curve.told)


def _fault_of(state: dict[str, Tensor], before: dict[str, Tensor], device: torch.device) -> str | None:
    shapes = [{name: tensor.shape for name, tensor in one.items()} for one in (state, before)]
    if shapes[0] != shapes[1]:
        changed = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        return f"left the model with other tensors than it was given ({changed[0]}, for example)"
    for name, tensor in state.items():
        if tensor.device.type != device.type:
            return f"left {name} on {tensor.device}, not on {device}"
        if tensor.dtype != before[name].dtype:
            return f"left {name} as {tensor.dtype}, not as {before[name].dtype}"
        if tensor.is_floating_point() and not tensor.isfinite().all() and before[name].isfinite().all():
            return f"left values in {name} that are not finite"
    return None
