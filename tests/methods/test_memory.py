"""The largest memory of real processes: bounded, and not growing with the number of calibration samples."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

APPLY = """
import resource, sys
import torch, torchvision
from torch import nn
from compress_search import activations, reconstruction
from compress_search.methods import METHODS
from compress_search.selection.uniform import select_uniform

net, method = sys.argv[1:3]
samples, size, part = map(int, sys.argv[3:])
for module, bound in (
    (activations, "_PASS_BYTES"),
    (reconstruction, "_WAITING_BYTES"),
    (reconstruction, "_KEPT_BYTES"),
    (reconstruction, "_CHAIN_BYTES"),
):
    setattr(module, bound, getattr(module, bound) // part)
torch.set_num_threads(1)
torch.manual_seed(0)
if net == "vgg16_bn":
    model = torchvision.models.vgg16_bn(weights=None).eval()
else:
    blocks = [(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(3)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    model = nn.Sequential(nn.Conv2d(3, 32, 1), *(part for block in blocks for part in block), *head).eval()
batches = list(torch.split(torch.randn(samples, 3, size, size), 32))
analysis = METHODS[method].analyse(model, batches[0][:1])
analysis.apply(select_uniform(analysis, 0.5), batches)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""

METHODS = ("spatial_svd", "channel_pruning")


def _peaks(net: str, runs: Sequence[tuple[str, int]], *, size: int, part: int = 1) -> list[int]:
    """Peak resident bytes of processes that compress a network, side by side, imports included.

    Args:
        net: The network.
        runs: Of each process the method and the number of samples.
        size: Of the images.
        part: What is bounded may take one in so many of the usual bytes.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", APPLY, net, method, str(samples), str(size), str(part)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for method, samples in runs
    ]
    written = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(runs)
    return [int(text) for text in written]


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_samples(method):
    # Half a megabyte a map and example: with the fewer samples, what may wait is full already. Unbounded, the
    # others would add three maps each; the allocator leaves gaps that come to a part of that.
    few, many = _peaks("wide maps", [(method, 144), (method, 288)], size=64, part=4)
    assert many - few < 144 * 3 * 2**19 / 2


def test_vgg16_at_224_pixels_stays_under_four_gigabytes():
    # What 512 samples take beyond these 8: the samples themselves; the rows of the layer behind the flatten,
    # in float32 for the choice and for the refit, in float64 for the surgeon; and the rest of the memory that
    # passes may wait in.
    data = (512 - 8) * (3 * 224**2 * 4 + 25088 * (4 + 4 + 8)) + 2**27
    peaks = _peaks("vgg16_bn", [(method, 8) for method in METHODS], size=224)
    assert [peak for peak in peaks if peak + data >= 4e9] == []
