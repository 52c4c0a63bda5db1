"""Knowledge distillation: how far a student's outputs are from its teacher's."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def distillation_loss(outputs: Tensor, taught: Tensor, *, logits: bool, temperature: float) -> Tensor:
    """How far a model's outputs are from its teacher's.

    Of logits, the loss is that of Hinton et al. (2015): the Kullback-Leibler divergence of the two softened
    distributions, times ``temperature**2`` so that its gradient keeps its size. Of anything else it is the
    mean squared error.

    Args:
        outputs: ``(batch, classes, *positions)`` for logits, any shape otherwise.
        taught: The teacher's outputs, of the same shape.
        logits: Whether the outputs are logits.
        temperature: Softening of both distributions, positive.

    Returns:
        The mean over all examples and positions, a scalar.
    """
    if not logits:
        return functional.mse_loss(outputs, taught)
    divergence = functional.kl_div(
        functional.log_softmax(outputs / temperature, dim=1),
        functional.log_softmax(taught / temperature, dim=1),
        reduction="none",
        log_target=True,
    )
    return temperature**2 * divergence.sum(dim=1).mean()


def are_logits(outputs: Tensor, targets: Tensor | None, loss: object) -> bool:
    """Whether outputs are logits: where the targets are class indices, one for each distribution.

    Args:
        outputs: ``(batch, classes, *positions)`` if they are.
        targets: What they are compared with; where there is nothing, the task's loss tells.
        loss: The task's loss.
    """
    if outputs.dim() < 2:
        return False
    if targets is None:
        return isinstance(loss, nn.CrossEntropyLoss)
    return not targets.is_floating_point() and outputs.shape[:1] + outputs.shape[2:] == targets.shape
