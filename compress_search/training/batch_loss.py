"""The loss of one batch: the task's own, and how far the model is from its teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compress_search.exceptions import TrainingError
from compress_search.moments import in_full_precision
from compress_search.recipe import FineTune
from compress_search.task import Loss, Task
from compress_search.training.distillation import are_logits, distillation_loss


class BatchLoss:
    """What training makes small.

    Args:
        model: What is trained; it may be a compiled one.
        task: Gives the loss.
        settings: Weigh the two.
        device: Where the model is.

    Raises:
        TrainingError: The task's loss cannot smooth labels, but is asked to.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: FineTune,
        device: torch.device,
    ) -> None:
        self._model, self._settings, self._device = model, settings, device
        self._task_loss = smoothed(task.loss_on(device), settings)

    def __call__(self, inputs: Tensor, targets: Tensor | None, taught: Any) -> Tensor:
        """Run the model on ``(batch, ...)`` and return the mean loss, a scalar.

        Args:
            inputs: The batch.
            targets: Of the task's loss.
            taught: What the teacher says of the batch; ``None`` if there is no teacher.

        Raises:
            TrainingError: The loss cannot take what the model returns in training, or that cannot be
                distilled, or there are no targets where they are needed.
        """
        outputs = self._model(inputs)
        # In full precision, as PyTorch advises; some losses (BCELoss) refuse anything else on a GPU.
        with torch.autocast(self._device.type, enabled=False):
            return self._of_outputs(*tree_map_only(Tensor, in_full_precision, (outputs, targets, taught)))

    def _of_outputs(self, outputs: Any, targets: Tensor | None, taught: Any) -> Tensor:
        if taught is None:
            return self._own_loss(outputs, targets)
        weight = self._settings.distillation
        own = 0.0 if weight == 1 else self._own_loss(outputs, targets)
        if isinstance(outputs, tuple):
            # With auxiliary heads, the main output comes first; the original is asked for that alone.
            outputs = outputs[0]
        if not isinstance(outputs, Tensor) or not isinstance(taught, Tensor) or outputs.shape != taught.shape:
            raise TrainingError(
                f"A model that returns a {type(outputs).__name__} cannot be distilled from an original that "
                f"returns a {type(taught).__name__}; both must return one tensor of the same shape. "
                "Set fine_tune.distillation to 0."
            )
        logits = are_logits(outputs, targets, self._task_loss)
        distilled = distillation_loss(outputs, taught, logits=logits, temperature=self._settings.temperature)
        return (1 - weight) * own + weight * distilled

    def _own_loss(self, outputs: Any, targets: Tensor | None) -> Tensor:
        if targets is None:
            raise TrainingError(NO_LABELS.format(self._settings.distillation))
        try:
            return self._task_loss(outputs, targets)
        except Exception as error:
            if isinstance(outputs, Tensor):
                raise
            raise TrainingError(
                f"In training, {type(self._model).__name__} returns a {type(outputs).__name__}, which the "
                f"task's loss cannot take ({type(error).__name__}: {error}). Give Task(loss=...) a function "
                "that takes what the model returns in training and what it returns in evaluation."
            ) from error


NO_LABELS = (
    "train yields no targets, but fine_tune.distillation is {:g}, which leaves a part to the task's loss. "
    "Set it to 1 to learn from the original model alone, or give batches of (inputs, targets)."
)


def smoothed(loss: Loss, settings: FineTune) -> Loss:
    """The loss with its labels smoothed as the settings say (Szegedy et al. 2016, section 7).

    Args:
        loss: A loss of the training's own, which may be changed.
        settings: Say by how much.

    Raises:
        TrainingError: It cannot smooth labels, but is asked to.
    """
    if settings.label_smoothing == 0:
        return loss
    if not isinstance(loss, nn.CrossEntropyLoss):
        name = getattr(loss, "__name__", type(loss).__name__)
        raise TrainingError(
            f"fine_tune.label_smoothing is {settings.label_smoothing:g}, but the task's loss ({name}) is not "
            "torch.nn.CrossEntropyLoss, so that its labels cannot be smoothed from outside. Smooth them in "
            "the loss itself, and set label_smoothing to 0."
        )
    loss.label_smoothing = settings.label_smoothing
    return loss
