"""Mixed precision: in which number format the model is run in training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from compress_search.exceptions import TrainingError


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The number format of the model's multiplications in training.

    Args:
        precision: See :class:`compress_search.recipe.FineTune`.
        device: Where it is trained.

    Raises:
        TrainingError: ``"float16"`` was asked for where it is not to be had.
    """
    if precision == "float16" and device.type != "cuda":
        raise TrainingError(
            f"fine_tune.precision is 'float16', but the model is trained on {device.type}, where only "
            "float32 and bfloat16 are to be had. Write 'auto', which takes what the device is good at."
        )
    if precision != "auto":
        dtype: torch.dtype = getattr(torch, precision)
        return dtype
    if device.type != "cuda":
        return torch.float32
    # Older GPUs only emulate bfloat16, slower than float32. `is_bf16_supported` counts that as well, and asks
    # the current GPU rather than this one. (The numbers of AMD's begin above 8.)
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def casting(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Run what is in the block in that format, where it is safe; with float32, leave everything as it is."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def make_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Scales losses so that gradients of the narrow float16 do not vanish; does nothing for others."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
