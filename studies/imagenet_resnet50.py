"""Half the MACs of ResNet-50 on ImageNet: what the AIMET guidebook does by hand, as one study.

Launch it with ``IMAGENET=FOLDER python studies/imagenet_resnet50.py``, where FOLDER has ``train``
and ``val``, or the official archives. ``--preset smoke`` shows that all is in place, ``--preset full`` is the
guidebook's job. ``configs/imagenet_resnet50.yaml`` has the table of the presets, and
``compress-search run`` with that file does the same.
"""

from __future__ import annotations

from typing import Any

from imagenet_task import imagenet_task
from launching import launch

from compress_search import Task


def make_task(**settings: Any) -> Task:
    """Build the task; the settings are those of :func:`imagenet_task.imagenet_task`."""
    return imagenet_task("resnet50", **settings)


if __name__ == "__main__":
    launch(__file__, __doc__)
