"""Where to compute: a processor or GPU by its name."""

from __future__ import annotations

import torch

from compress_search.exceptions import DeviceError


def choose_device(name: str | None) -> torch.device:
    """Return the device of a name; ``None`` is the first GPU if there is one.

    Raises:
        DeviceError: It is no device, or one that this machine does not have.
    """
    count = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device is {name!r}; write, for example, cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(f"device is {name!r}, but PyTorch sees {count} CUDA devices here. Leave it out.")
    return device
