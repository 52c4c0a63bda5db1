"""How far the sum of the sensitivity table predicts the loss of the whole, and whether correcting it helps.

Launch it with ``python studies/benchmarks/interaction.py``; ``--net vgg`` measures the other network, and
trains it first if need be. Sensitivities are measured one layer at a time, with all others as they were. The
script chooses sizes by the table, compresses, and compares the sum of the table with the divergence of the
whole, before and after the refit. Then it measures each layer again around the chosen sizes, with all others
at theirs, scales its curve to what that says (by the square root, within limits), chooses again, and
compresses again.

What came of it on ResNet-20 is in studies/RESULTS.md: the correction does not pay, so the package does
not have it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from cifar10_networks import EXAMPLE, NETWORKS
from image_data.cifar10 import load_cifar10
from image_data.in_memory import normalised, whole_batches
from train_baseline import trained

from compress_search import Compress, SensitivityTable
from compress_search.calibration import divergence
from compress_search.compression import (
    TableSource,
    analyse,
    apply,
    choose_sizes,
    last_samples,
    sensitivity_table,
)
from compress_search.divergence import Divergence, divergence_of
from compress_search.methods.method import Analysis, Sizes
from compress_search.replay import Prefix
from compress_search.selection.choices import size_choices
from compress_search.selection.curves import loss_curves
from compress_search.selection.request import SelectionRequest
from compress_search.selection.sensitivity import candidate_sizes
from compress_search.task import accuracy

CALIBRATION_IMAGES = 512
SCORING_IMAGES = 256
BATCH = 32
STAGES = tuple(
    Compress(method=method, mac_ratio=ratio, samples=CALIBRATION_IMAGES, scoring_samples=SCORING_IMAGES)
    for method in ("spatial_svd", "channel_pruning")
    for ratio in (0.66, 0.5)
)
LEAST_FACTOR, MOST_FACTOR = 0.6, 1.67
"""Within what a layer's curve is scaled."""


@dataclass(frozen=True)
class Joint:
    """Measures the divergence of the whole without building it.

    Attributes:
        analysis: The method's view of the network.
        calibration: Images to compress with.
        scoring: Images to measure on.
    """

    analysis: Analysis
    calibration: Sequence[Tensor]
    scoring: Sequence[Tensor]

    def losses(self, sizes: Sizes, others: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], float]:
        """The divergence with all units at their sizes but one, which has another; ``("", 0)`` has none."""
        wanted = {name: sorted({size, *others.get(name, ())} - {0}) for name, size in sizes.items()}
        wanted |= {name: sorted({*own} - {0}) for name, own in others.items() if name not in sizes}
        found = {i.unit: i.parameters for i in self.analysis.imitations(wanted, self.calibration)}

        def loss(changed: Mapping[str, int]) -> float:
            parameters: dict[str, Tensor] = {}
            for name, size in changed.items():
                parameters |= found[name][size] if size else {}
            total = Divergence()
            for images in self.scoring:
                rerun = Prefix(self.analysis.model, images, []).rerun
                total += divergence_of(rerun(parameters), rerun({}))
            return total.mean

        return {("", 0): loss(sizes)} | {
            (name, size): loss({**sizes, name: size}) for name, own in others.items() for size in own
        }


def neighbours(analysis: Analysis, table: SensitivityTable, sizes: Sizes) -> dict[str, tuple[int, int]]:
    """For each unit of the table the candidate sizes just below and above its own; 0 is as it was."""
    found = {}
    for unit in analysis.units:
        if unit.name not in table.units:
            continue
        own = candidate_sizes(analysis, unit)
        size = sizes.get(unit.name, unit.full_size)
        below = [candidate for candidate in own if candidate < size]
        above = [candidate for candidate in own if candidate > size]
        found[unit.name] = (below[-1] if below else own[0], above[0] if above else 0)
    return found


def corrected(
    table: SensitivityTable, around: Mapping[str, tuple[int, int]], joint: Mapping[tuple[str, int], float]
) -> SensitivityTable:
    """Scale each unit's losses by what its neighbouring sizes make of the whole."""
    factors = {}
    for name, (below, above) in around.items():
        alone = table.losses(name)[below] - (table.losses(name)[above] if above else 0.0)
        together = joint[name, below] - joint[name, above]
        ratio = together / alone if alone > 0 and together > 0 else LEAST_FACTOR**2
        factors[name] = min(max(math.sqrt(ratio), LEAST_FACTOR), MOST_FACTOR)
    cells = tuple(
        dataclasses.replace(cell, loss=cell.loss * factors.get(cell.unit, 1.0)) for cell in table.cells
    )
    return SensitivityTable(cells, table.fingerprint)


def predicted(analysis: Analysis, table: SensitivityTable, stage: Compress, sizes: Sizes) -> float:
    """The sum of the table at some sizes, interpolated as the selector does."""
    cost = analysis.cost(stage.cost)
    choices = size_choices(analysis, SelectionRequest(ratio=stage.mac_ratio))
    curves = loss_curves(table, cost.full, choices)
    return float(curves.of_rows(cost.row(sizes)[None])[0])


def measure(
    network: nn.Module, stage: Compress, images: Tensor, test: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Print the rows of one stage."""
    batches = list(torch.split(normalised(images), BATCH))
    source = TableSource(batches)
    analysis = analyse(network, EXAMPLE, stage)
    table = sensitivity_table(analysis, stage, source)
    joint = Joint(analysis, batches, last_samples(batches, SCORING_IMAGES))
    for label in ("the table", "the corrected table"):
        sizes = choose_sizes(analysis, stage, source, table=table)
        around = neighbours(analysis, table, sizes) if label == "the table" else {}
        losses = joint.losses(sizes, around)
        model = apply(analysis, sizes, batches).model
        after = divergence(model, network, [inputs for inputs, _ in test])
        print(
            f"| {stage.method} | {stage.mac_ratio} | {label} "
            f"| {predicted(analysis, table, stage, sizes):.4f} "
            f"| {losses['', 0]:.4f} | {after:.4f} | {accuracy(model, test):.2%} |",
            flush=True,
        )
        table = corrected(table, around, losses)


def main() -> None:
    """Measure one network."""
    parser = argparse.ArgumentParser(description="The sum of the sensitivity table against the whole.")
    parser.add_argument("--net", choices=list(NETWORKS), default="resnet20")
    name = parser.parse_args().net
    torch.set_num_threads(1)
    train, test = load_cifar10()
    network, batches = trained(name, train), whole_batches(test)
    print(f"{name}: {accuracy(network, batches):.2%} on the test images. Divergences in nats.")
    print(
        "| method | ratio | sizes by | sum of the table | whole, no refit | whole, test images | accuracy |"
    )
    print("|---|--:|---|--:|--:|--:|--:|")
    for stage in STAGES:
        measure(network, stage, train.pixels[:CALIBRATION_IMAGES], batches)


if __name__ == "__main__":
    main()
