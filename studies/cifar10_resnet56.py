"""Less than half the MACs of ResNet-56 on CIFAR-10 (2.1 times fewer), as the literature compares it.

Launch it with ``python studies/cifar10_resnet56.py``. ``--preset smoke`` shows within minutes that all is in
place, ``--preset full`` is for a GPU. ``configs/cifar10_resnet56.yaml`` has the table of the presets, and
``compress-search run`` with that file does the same.
"""

from __future__ import annotations

from typing import Any

from cifar10_task import cifar10_task
from launching import launch

from compress_search import Task


def make_task(**settings: Any) -> Task:
    """Build the task; the settings are those of :func:`cifar10_task.cifar10_task`."""
    return cifar10_task("resnet56", **settings)


if __name__ == "__main__":
    launch(__file__, __doc__)
