"""compress_search in a process of its own, as its peers are.

It does what :func:`compress_search.compression.compress` does, and looks at the clock after the selection.

Settings of a case are those of :class:`compress_search.Compress`, for every step. With another seed it looks
at other images.
"""

from __future__ import annotations

import time
from importlib import metadata

import torch
from cifar10_networks import EXAMPLE, NETWORKS
from torch import nn

from benchmarks.cases import Request, asked_ratio
from benchmarks.peer import Compression, Images, run
from compress_search import Compress
from compress_search.compression import TableSource, analyse, apply, choose_sizes, sensitivity_table
from compress_search.memory_layout import in_quickest_layout
from compress_search.profile import profile_model
from compress_search.selection import SELECTORS

BATCH = 32
"""Images a calibration batch, as many as a study takes."""


def compress(request: Request, network: nn.Module, images: Images) -> Compression:
    """Run the steps of a case one after the other; the last gets what the others left of the budget."""
    original = profile_model(network, EXAMPLE).macs
    allowed = request.budget or asked_ratio(request.case) * original
    seconds, cells = 0.0, 0
    for step in request.case.steps:
        start = time.perf_counter()
        left = min(allowed / profile_model(network, EXAMPLE).macs, 1.0)
        ratio = left if step == request.case.steps[-1] else step.mac_ratio
        stage = Compress(method=step.method, mac_ratio=ratio, **request.case.settings)
        analysis = analyse(network, EXAMPLE, stage)
        seen = images.calibration.roll(-request.case.seed * stage.samples, dims=0)[: stage.samples]
        batches = torch.split(seen, BATCH)
        source = TableSource(in_quickest_layout(network, batches))
        table = sensitivity_table(analysis, stage, source) if SELECTORS[stage.selection].needs_table else None
        sizes = choose_sizes(analysis, stage, source, table=table)
        seconds += time.perf_counter() - start
        cells += 0 if table is None else sum(cell.measured for cell in table.cells)
        network = apply(analysis, sizes, source.calibration).model
    return Compression(network, seconds, cells)


if __name__ == "__main__":
    run(compress, lambda name: NETWORKS[name](), f"compress-search {metadata.version('compress-search')}")
