"""What every tool's process does: read the request, compress under the clock, write what came of it.

The process is started in the case's folder, where ``request.json`` lies, as
``python -m benchmarks.<tool>_peer WEIGHTS IMAGES``. It writes ``effort.json``, ``layers.json`` and
``model.safetensors`` there.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cases import Effort, Request
from benchmarks.layers import count_macs, layers_of
from benchmarks.networks import INPUT_SHAPE

PROBE = "probe"
"""Name, in ``model.safetensors``, of the outputs for the first evaluation images."""

PROBES = 8


@dataclass(frozen=True)
class Images:
    """What a tool may look at. All of it is training data; the test images are the judge's.

    Attributes:
        calibration: ``(images, 3, 32, 32)``, without labels.
        inputs: ``(images, 3, 32, 32)``, for evaluation.
        labels: ``(images,)``, the labels of ``inputs``.
    """

    calibration: Tensor
    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Compression:
    """What a tool gives back; see :class:`benchmarks.cases.Effort` for the numbers."""

    network: nn.Module
    selection_seconds: float | None
    evaluations: int | None


Compress = Callable[[Request, nn.Module, Images], Compression]


class Work:
    """The MACs that convolutions and linear layers have done.

    Attributes:
        macs: Their number so far.
    """

    def __init__(self) -> None:
        self.macs = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count within the block, in whatever network.

        The functions that the layers call are watched, not the layers: compress_search skips layers whose
        outputs it still has, and hooks of PyTorch would not see that.
        """
        watched = {name: getattr(functional, name) for name in ("conv2d", "linear")}
        for name, function in watched.items():
            setattr(functional, name, self._counting(function))
        try:
            yield
        finally:
            for name, function in watched.items():
                setattr(functional, name, function)

    def _counting(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counting(images: Tensor, weight: Tensor, *arguments: Any, **others: Any) -> Tensor:
            outputs = function(images, weight, *arguments, **others)
            # AIMET traces its models; what is asked of a tensor then would become part of the graph.
            if not _tracing():
                # As many multiplications for each number put out as one filter has weights.
                self.macs += outputs.numel() * (weight.numel() // weight.shape[0])
            return outputs

        return counting


def run(compress: Compress, build: Callable[[str], nn.Module], version: str) -> None:
    """Do what the request in this folder asks for.

    Args:
        compress: The tool.
        build: Makes a network from its name.
        version: Of the tool.
    """
    request = Request.from_json(Path("request.json").read_text())
    weights, images = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(request.threads)
    torch.manual_seed(request.case.seed)
    network = build(request.case.network)
    network.load_state_dict(load_file(weights))
    network.eval()
    original = count_macs(network, INPUT_SHAPE)
    given = Images(**load_file(images))
    work, start, cpu_start = Work(), time.perf_counter(), time.process_time()
    with work.counted():
        done = compress(request, network, given)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    effort = Effort(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        selection_seconds=done.selection_seconds,
        evaluations=done.evaluations,
        image_forwards=work.macs / original,
        peak_gigabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        version=f"{version}, torch {torch.__version__}",
    )
    _write(done.network.eval(), given, effort)


def _tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _write(network: nn.Module, images: Images, effort: Effort) -> None:
    with torch.no_grad():
        probe = network(images.inputs[:PROBES])
    tensors = {name: value.detach().contiguous() for name, value in network.state_dict().items()}
    save_file({**tensors, PROBE: probe}, "model.safetensors")
    Path("layers.json").write_text(json.dumps([dataclasses.asdict(layer) for layer in layers_of(network)]))
    Path("effort.json").write_text(json.dumps(dataclasses.asdict(effort)))
