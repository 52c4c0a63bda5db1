"""What the data-aware methods save, without fine-tuning: two networks on CIFAR-10 at half of their MACs.

Launch it with ``python studies/method_benchmark.py``; ``--net vgg`` or ``--net resnet20`` measures one
network alone. Each is compressed in seven ways. Uniform selection fixes the sizes once for each method, so
the cases of a method differ in nothing but how they choose and reconstruct. The methods see 2,000 training
images without labels; the test images are looked at for the numbers of the table, and for nothing else.

Which 2,000 images they are moves an accuracy by some tenths of a point. So every case that sees them is done
several times, with images that no other time saw, and the table holds the means. Beside the accuracy it has
the divergence of the outputs from the original network's, which tells small differences apart better.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean

import torch
from cifar10_networks import EXAMPLE
from image_data.cifar10 import load_cifar10
from image_data.images import Images
from image_data.in_memory import normalised, whole_batches
from torch import Tensor, nn
from train_baseline import trained

from compress_search.calibration import divergence, reestimated_batchnorm
from compress_search.methods.channel_pruning import ChannelPruning, ChannelPruningAnalysis
from compress_search.methods.method import Compressed
from compress_search.methods.spatial_svd import SpatialSVD
from compress_search.plan import KeepChannels
from compress_search.profile import profile_model
from compress_search.reconstruction import Refit, refit_in_forward_order
from compress_search.selection.uniform import select_uniform
from compress_search.task import accuracy

MAC_RATIO = 0.5
CALIBRATION_IMAGES = 2_000
CALIBRATION_SETS = 3
CALIBRATION_BATCH = 50
FOLDER = Path("runs/method_benchmark")
MEASURED = ("resnet20", "vgg")

PLAIN_SVD = "spatial SVD, plain"
PLAIN_SVD_NORMALISED = "spatial SVD, plain, BatchNorm re-estimated"
AWARE_SVD = "spatial SVD, data-aware"
MAGNITUDE = "pruning, magnitude"
MAGNITUDE_NORMALISED = "pruning, magnitude, BatchNorm re-estimated"
MAGNITUDE_REFITTED = "pruning, magnitude, reconstructed"
SURGEON = "pruning, brain surgeon, reconstructed"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        net: Name of the network.
        case: What was done to it.
        mac_ratio: MACs that are left / MACs of the network, counted.
        accuracy: Share of the 10,000 test images that are classified rightly, the mean over the times.
        lowest: The lowest accuracy of all times.
        drop: Accuracy lost, in percentage points.
        divergence: Of the outputs on the test images from the original's, in nats.
        times: How often it was done, each time with other calibration images.
        seconds: Time that the compression took once, evaluation excluded.
    """

    net: str
    case: str
    mac_ratio: float
    accuracy: float
    lowest: float
    drop: float
    divergence: float
    times: int
    seconds: float


def measure(
    name: str, network: nn.Module, calibrations: Sequence[Sequence[Tensor]], test: Images
) -> list[Row]:
    """Compress a network in seven ways and evaluate each."""
    batches = whole_batches(test)
    images = [inputs for inputs, _ in batches]
    profile, before = profile_model(network, EXAMPLE), accuracy(network, batches)
    rows = [Row(name, "original", 1.0, before, before, 0.0, 0.0, 1, 0.0)]
    factorisation = SpatialSVD().analyse(network, EXAMPLE)
    ranks = select_uniform(factorisation, MAC_RATIO)
    pruning = ChannelPruning().analyse(network, EXAMPLE)
    widths = select_uniform(pruning, MAC_RATIO)
    plain, magnitude = factorisation.apply(ranks, []), pruning.apply(widths, [])
    cases: Mapping[str, Callable[[Sequence[Tensor]], nn.Module]] = {
        PLAIN_SVD: lambda _: factorisation.apply(ranks, []).model,
        PLAIN_SVD_NORMALISED: lambda calibration: reestimated_batchnorm(plain.model, calibration),
        AWARE_SVD: lambda calibration: factorisation.apply(ranks, calibration).model,
        MAGNITUDE: lambda _: pruning.apply(widths, []).model,
        MAGNITUDE_NORMALISED: lambda calibration: reestimated_batchnorm(magnitude.model, calibration),
        MAGNITUDE_REFITTED: lambda calibration: reconstructed(pruning, magnitude, calibration),
        SURGEON: lambda calibration: pruning.apply(widths, calibration).model,
    }
    for case, compress in cases.items():
        models, seconds = [], 0.0
        for calibration in calibrations[:1] if case in (PLAIN_SVD, MAGNITUDE) else calibrations:
            start = time.perf_counter()
            models.append(compress(calibration))
            seconds += time.perf_counter() - start
        ratio = profile_model(models[0], EXAMPLE).mac_ratio(profile)
        after = [accuracy(model, batches) for model in models]
        apart = mean(divergence(model, network, images) for model in models)
        lost, each = 100 * (before - mean(after)), seconds / len(models)
        rows.append(Row(name, case, ratio, mean(after), min(after), lost, apart, len(models), each))
        print(f"{name}: {case}: {mean(after):.4f}, {apart:.4f} nats, {each:.0f} s each time", flush=True)
    return rows


def reconstructed(
    pruning: ChannelPruningAnalysis, pruned: Compressed, calibration: Sequence[Tensor]
) -> nn.Module:
    """Reconstruct a network that was pruned without data just as the method does when it has data."""
    outputs = {e.layer: e.outputs for e in pruned.step.edits if isinstance(e, KeepChannels)}
    layers = itertools.dropwhile(lambda layer: layer.name not in outputs, pruning.profile.layers)
    refits = [Refit(layer.name, source=layer.name, outputs=outputs.get(layer.name)) for layer in layers]
    model = copy.deepcopy(pruned.model)
    refit_in_forward_order(model, pruning.model, refits, calibration)
    return model


def findings(rows: Sequence[Row]) -> list[str]:
    """Say for one network what a data-aware case loses as a share of what its counterpart loses."""
    net, row = rows[0].net, {row.case: row for row in rows}
    return [
        f"* {net}: {case} loses {row[case].drop / row[other].drop:.2f} of the accuracy that {other} loses "
        f"(wanted: {wanted}), and diverges {row[case].divergence / row[other].divergence:.2f} times as far."
        for case, other, wanted in (
            (AWARE_SVD, PLAIN_SVD, "at most 0.50"),
            (SURGEON, MAGNITUDE, "at most 0.33"),
            (SURGEON, MAGNITUDE_REFITTED, "clearly less than 1"),
        )
    ]


def as_markdown(rows: Sequence[Row]) -> str:
    """The table of one network with its findings."""
    lines = [
        "| net | case | MAC ratio | accuracy | lowest | drop (points) | divergence | times | seconds |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.net} | {row.case} | {row.mac_ratio:.4f} | {row.accuracy:.2%} | {row.lowest:.2%} "
        f"| {row.drop:.2f} | {row.divergence:.4f} | {row.times} | {row.seconds:.0f} |"
        for row in rows
    ]
    return "\n".join([*lines, "", *findings(rows), ""])


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write one network's table as Markdown and as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{rows[0].net}.md").write_text(as_markdown(rows))
    with (folder / f"{rows[0].net}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main() -> None:
    """Measure each network, train it first if need be; print its table and write it to the folder."""
    parser = argparse.ArgumentParser(description="Data-aware against data-free methods on CIFAR-10.")
    parser.add_argument("--net", choices=MEASURED, help="measure this one alone")
    only = parser.parse_args().net
    torch.set_num_threads(1)
    train, test = load_cifar10()
    seen = train.pixels[: CALIBRATION_IMAGES * CALIBRATION_SETS]
    calibrations = [
        list(torch.split(normalised(part), CALIBRATION_BATCH))
        for part in torch.split(seen, CALIBRATION_IMAGES)
    ]
    for name in [only] if only else MEASURED:
        rows = measure(name, trained(name, train), calibrations, test)
        write(rows, FOLDER)
        print(as_markdown(rows))


if __name__ == "__main__":
    main()
