"""Training by a function of the user's own, in place of the package's.

The contract is one call: ``training(model, job)`` changes the weights of ``model`` in place. Any framework
will do; ``studies/lightning_training.py`` does it with Lightning. What surrounds the call stays as it is: the
stage is stored under the hash of everything that made it, reused by other trials, and evaluated by the task.
"""

from __future__ import annotations

from collections.abc import Callable
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


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What a training function is to do, and with what.

    Attributes:
        original: The uncompressed model on the same device, in evaluation mode, as a teacher. It must not be
            changed.
        task: Its ``train`` and ``validation`` loaders, its ``loss``, and ``task.score(model)``.
        settings: The stage's settings; ``settings.epochs`` and ``settings.lr`` are what the search chose, and
            ``settings.options`` holds whatever else the user wrote.
        seed: Every random source is seeded with it when the function is called; for those that the function
            has of its own.
        device: Where the model is, and has to be in the end.
        folder: A folder for checkpoints, empty at first, which the same job finds again after it was killed.
            It is removed when the stage is stored.
        progress: ``progress.bar("epochs", n)`` draws a bar and writes to the log; ``progress.say(text)``.
        stop_requested: Whether Ctrl-C was pressed or SIGTERM came. Ask after each step; if so, leave a
            checkpoint in ``folder`` and raise :class:`KeyboardInterrupt`. A second Ctrl-C raises it at once.
    """

    original: nn.Module
    task: Task
    settings: FineTune
    seed: int
    device: torch.device
    folder: Path
    progress: Progress
    stop_requested: Callable[[], bool]


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
) -> float:
    """Call the task's training function, and keep what came of it if it is no worse.

    Args:
        model: The model to train in place. It is left in evaluation mode.
        original: See :class:`TrainingJob`, also for the others.
        task: Has a training function.
        settings: The stage's settings; with 0 epochs the model is only evaluated.
        seed: Of the stage.
        progress: Where to show it.
        folder: For the function's checkpoints.
        stop: Says when to stop.

    Returns:
        What ``task.score(model)`` says of the weights that were kept.

    Raises:
        TrainingError: The function raised, or left the model with other tensors than it was given, on another
            device, or with weights that are not finite.
        EvaluationError: See :meth:`compress_search.task.Task.score`.
    """
    assert task.training is not None
    before = task.score(model.eval())
    if settings.epochs == 0:
        return before
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    device = next(model.parameters()).device
    folder.mkdir(parents=True, exist_ok=True)
    job = TrainingJob(
        original=original,
        task=task,
        settings=settings,
        seed=seed,
        device=device,
        folder=folder,
        progress=progress,
        stop_requested=lambda: stop.requested,
    )
    name = getattr(task.training, "__name__", type(task.training).__name__)
    with seeded(seed, task.train), stop.finishing():
        try:
            task.training(model, job)
        except Exception as error:
            raise TrainingError(f"Task.training ({name}) raised {type(error).__name__}: {error}") from error
    if fault := _fault_of(model.state_dict(), state, device):
        raise TrainingError(
            f"Task.training ({name}) {fault}. It is to change the weights of "
            "the model in place, and nothing else."
        )
    after = task.score(model.eval())
    if after < before:
        model.load_state_dict(state)
        progress.say(
            f"{name} made the model worse ({before:.4f} before, {after:.4f} after): it is left as it was."
        )
        return before
    return after


def _fault_of(state: dict[str, Tensor], before: dict[str, Tensor], device: torch.device) -> str | None:
    shapes = [{name: tensor.shape for name, tensor in one.items()} for one in (state, before)]
    if shapes[0] != shapes[1]:
        changed = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        return f"left the model with other tensors than it was given ({changed[0]}, for example)"
    for name, tensor in state.items():
        if tensor.device.type != device.type:
            return f"left {name} on {tensor.device}, not on {device}"
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"left values in {name} that are not finite"
    return None
