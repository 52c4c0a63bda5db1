"""Knowledge distillation: how far a student's outputs are from its teacher's."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def distillation_loss(outputs: Tensor, taught: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """How far a model's outputs are from its teacher's.

    Where the targets are class indices, the outputs are logits and the loss is that of Hinton et al.
    (2015): the Kullback-Leibler divergence of the two softened distributions, times ``temperature**2``
    so that its gradient keeps its size. Anywhere else it is the mean squared error of the outputs.

    Args:
        outputs: ``(batch, classes, *positions)`` for logits, any shape otherwise.
        taught: The teacher's outputs, of the same shape.
        targets: ``(batch, *positions)`` integers for logits, anything otherwise.
        temperature: Softening of both distributions, positive.

    Returns:
        The mean over all examples and positions, a scalar.
    """
    are_logits = not targets.is_floating_point() and outputs.shape[:1] + outputs.shape[2:] == targets.shape
    if not are_logits or outputs.dim() < 2:
        return functional.mse_loss(outputs, taught)
    divergence = functional.kl_div(
        functional.log_softmax(outputs / temperature, dim=1),
        functional.log_softmax(taught / temperature, dim=1),
        reduction="none",
        log_target=True,
    )
    return temperature**2 * divergence.sum(dim=1).mean()
