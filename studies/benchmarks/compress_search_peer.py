"""compress_search by its public interface, in a process of its own as its peers are.

Settings of a case are those of :class:`compress_search.Compress`, for every step.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import torch
from cifar10_networks import EXAMPLE, NETWORKS
from torch import nn

from benchmarks.cases import Request, asked_ratio
from benchmarks.peer import Compression, Images, run
from compress_search import Compress, Recipe, Task, apply_plan
from compress_search.checkpoint import load_weights
from compress_search.progress import Progress
from compress_search.stage_store import StageStore
from compress_search.stages import StageRunner
from compress_search.workspace import Workspace

BATCH = 50


def compress(request: Request, network: nn.Module, images: Images) -> Compression:
    """Run the steps of a case as one recipe; the last step gets what the others left of the budget."""
    labelled = list(zip(torch.split(images.inputs, BATCH), torch.split(images.labels, BATCH), strict=True))
    task = Task(
        name=request.case.network,
        model=network,
        example_input=EXAMPLE,
        train=labelled,
        validation=labelled,
        calibration=list(torch.split(images.calibration, BATCH)),
    )
    workspace = Workspace(Path("workspace")).prepare()
    runner = StageRunner(
        task, workspace, seed=request.case.seed, device=torch.device("cpu"), progress=Progress()
    )
    settings = request.case.settings
    *earlier, last = request.case.steps
    stages = [Compress(method=step.method, mac_ratio=step.mac_ratio, **settings) for step in earlier]
    before = runner.run(Recipe(tuple(stages)))[-1].macs if stages else runner.reference.macs
    allowed = request.budget or asked_ratio(request.case) * runner.reference.macs
    stages.append(Compress(method=last.method, mac_ratio=min(allowed / before, 1.0), **settings))
    result = runner.run(Recipe(tuple(stages)))[-1]
    store = StageStore(workspace)
    compressed: nn.Module = apply_plan(network, store.plan(result.key))
    load_weights(compressed, store.weights(result.key))
    return Compression(compressed, None, None)


if __name__ == "__main__":
    run(compress, lambda name: NETWORKS[name][0](), f"compress-search {metadata.version('compress-search')}")
