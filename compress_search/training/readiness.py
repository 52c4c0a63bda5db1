"""Whether a task can be trained as the settings say, found before any work starts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from compress_search.exceptions import TaskError, TrainingError
from compress_search.fingerprint import is_repeatable, seeded
from compress_search.loaders import inputs_and_targets
from compress_search.profile import inference_mode_of
from compress_search.recipe import FineTune
from compress_search.task import Task
from compress_search.training.batch_loss import NO_LABELS, smoothed
from compress_search.training.precision import dtype_of

logger = logging.getLogger("compress_search")


def check_training(task: Task, settings: Iterable[FineTune | None], device: torch.device) -> None:
    """Find what of some settings the task does not allow.

    Args:
        task: A task that is sound in itself; see :meth:`compress_search.task.Task.check`.
        settings: All the fine-tunings that are to come; those of 0 epochs and ``None`` are none.
        device: Where models are trained.

    Raises:
        TaskError: With everything that is wrong, one fault a line.
    """
    own = [one for one in settings if one is not None and one.epochs > 0 and task.training is None]
    if not own:
        return
    faults = [*_model_faults(task, any(one.distillation > 0 for one in own), device)]
    with seeded(0, task.train):
        _, targets = inputs_and_targets(next(iter(task.train)))
    for one in own:
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
    if not is_repeatable(task.train):
        logger.warning(
            "The first batch of train is another one each time, even under the same seed: its random numbers "
            "come neither from torch nor from numpy's global generator nor from random. So trials do not see "
            "the same batches, the original is asked about all of them again, and a fine-tuning that was "
            "interrupted does not end with the same bits. Draw them from torch to have that."
        )


def _model_faults(task: Task, distils: bool, device: torch.device) -> Iterator[str]:
    model = task.build_model().to(device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        yield (
            "no parameter of the model requires a gradient, so that there is nothing to train. Call "
            "model.requires_grad_(), or set fine_tune.epochs to 0."
        )
    with inference_mode_of(model):
        outputs = model(task.example_input.to(device))
    if distils and not isinstance(outputs, Tensor):
        yield (
            f"the model returns a {type(outputs).__name__}, which cannot be distilled: that takes one "
            "tensor. Set fine_tune.distillation to 0, and have Task(loss=...) take what the model returns."
        )
