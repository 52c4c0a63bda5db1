"""AIMET's compression, in an environment of its own: ``aimet_torch.compress``, automatic mode.

Settings of a case: ``monotonic_fit`` (default false) and ``reconstruction_samples`` (channel pruning; AIMET
draws ten an image). Everything else is as in AIMET's guide: ten candidate ratios a layer, accuracy on 500
images, MACs as the cost.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cases import Request, Step
from benchmarks.networks import INPUT_SHAPE, PEER_NETWORKS
from benchmarks.peer import Compression, Images, run

CANDIDATES = 10
BATCH = 50
"""Images a batch: a divisor of the 50, 500 and 5,000 images that reconstruction takes."""


def import_torchvision() -> None:
    """Import torchvision though its compiled operators may be for another build of PyTorch.

    AIMET imports it, and never runs the two operators that are declared here in that case.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)  # type: ignore[no-untyped-call]
        # A library that is not kept takes its operators with it.
        globals()["_declared"] = library
        import torchvision  # noqa: F401


class Accuracy:
    """AIMET's evaluation callback.

    Attributes:
        calls: How often it was called.
    """

    def __init__(self, images: Images) -> None:
        self.calls = 0
        self._batches = list(
            zip(torch.split(images.inputs, BATCH), torch.split(images.labels, BATCH), strict=True)
        )

    def __call__(self, model: nn.Module, iterations: int | None = None, use_cuda: bool = False) -> float:
        """The share of the evaluation images that are classified rightly."""
        self.calls += 1
        model.eval()
        with torch.no_grad():
            right = [model(inputs).argmax(dim=1) == labels for inputs, labels in self._batches]
        return float(torch.cat(right).float().mean())


class Stopwatch:
    """Adds up the time within a method.

    Attributes:
        seconds: The time so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, timed."""

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def compress(request: Request, network: nn.Module, images: Images) -> Compression:
    """Run the steps of a case one after the other."""
    from aimet_torch.common.comp_ratio_select import GreedyCompRatioSelectAlgo as Selection
    from aimet_torch.common.defs import CompressionScheme, CostMetric
    from aimet_torch.compress import ModelCompressor

    random.seed(request.case.seed)
    np.random.seed(request.case.seed)
    accuracy, stopwatch = Accuracy(images), Stopwatch()
    Selection.select_per_layer_comp_ratios = stopwatch.around(Selection.select_per_layer_comp_ratios)
    for step in request.case.steps:
        network, _ = ModelCompressor.compress_model(
            network,
            eval_callback=accuracy,
            eval_iterations=None,
            input_shape=INPUT_SHAPE,
            compress_scheme=CompressionScheme[step.method],
            cost_metric=CostMetric.mac,
            parameters=parameters(step, request, network, images),
        )
    return Compression(network, stopwatch.seconds, accuracy.calls)


def parameters(step: Step, request: Request, network: nn.Module, images: Images) -> Any:
    """AIMET's parameters of one step."""
    from aimet_torch.common.defs import GreedySelectionParameters
    from aimet_torch.defs import ChannelPruningParameters, SpatialSvdParameters

    greedy = GreedySelectionParameters(
        target_comp_ratio=Decimal(str(step.mac_ratio)),
        num_comp_ratio_candidates=CANDIDATES,
        use_monotonic_fit=request.case.settings.get("monotonic_fit", False),
    )
    if step.method == "spatial_svd":
        kind = SpatialSvdParameters
        return kind(kind.Mode.auto, kind.AutoModeParams(greedy))
    kind = ChannelPruningParameters
    # AIMET refuses to prune the channels of the images themselves.
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    labels = torch.zeros(len(images.calibration))  # AIMET wants pairs, and never looks at the second.
    return kind(
        data_loader=DataLoader(TensorDataset(images.calibration, labels), batch_size=BATCH),
        num_reconstruction_samples=request.case.settings["reconstruction_samples"],
        allow_custom_downsample_ops=False,
        mode=kind.Mode.auto,
        params=kind.AutoModeParams(greedy, modules_to_ignore=[first]),
    )


def build(name: str) -> nn.Module:
    """The network with AIMET's own module for sums, which its graph knows."""
    from aimet_torch.nn.modules.custom import Add

    return PEER_NETWORKS[name](Add)


if __name__ == "__main__":
    import_torchvision()
    run(compress, build, f"aimet-torch {metadata.version('aimet-torch')}")
