"""Whether a task can be trained as the settings say, found before any work starts."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from compress_search.exceptions import TaskError, TrainingError
from compress_search.fingerprint import seeded
from compress_search.recipe import FineTune
from compress_search.task import Task, inputs_and_targets
from compress_search.training.batch_loss import NO_LABELS, smoothed
from compress_search.training.precision import dtype_of


def check_training(task: Task, settings: Iterable[FineTune | None], device: torch.device) -> None:
    """Find what of some settings the task does not allow.

    Args:
        task: A task that is sound in itself; see :meth:`compress_search.task.Task.check`.
        settings: All the fine-tunings that are to come; those of 0 epochs and ``None`` are none.
        device: Where models are trained.

    Raises:
        TaskError: With everything that is wrong, one fault a line.
    """
    faults: list[str] = []
    with seeded(0, task.train):
        _, targets = inputs_and_targets(next(iter(task.train)))
    for one in settings:
        if one is None or one.epochs == 0 or task.training is not None:
            continue
        if one.options:
            faults.append(
                f"fine_tune.options is {dict(one.options)!r}; options are for a training function of your "
                "own, and the task has none: Task(training=...)."
            )
        if targets is None and one.distillation < 1:
            faults.append(NO_LABELS.format(one.distillation))
        try:
            smoothed(task.loss_on(device), one)
        except TrainingError as error:
            faults.append(str(error))
        try:
            dtype_of(one.precision, device)
        except TrainingError as error:
            faults.append(str(error))
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in dict.fromkeys(faults))
        raise TaskError(f"The task {task.name!r} cannot be fine-tuned:\n{lines}")
