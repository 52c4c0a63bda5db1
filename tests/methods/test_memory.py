"""The largest memory of real processes: bounded, and not growing with the number of calibration samples."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

APPLY = """
import resource, sys
import torch, torchvision
from torch import nn
from compress_search.methods import METHODS
from compress_search.selection.uniform import select_uniform

net, method, samples, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
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

both_methods = pytest.mark.parametrize("method", ["spatial_svd", "channel_pruning"])


def _peak(net: str, method: str, *, samples: int, size: int) -> int:
    """Peak resident bytes of a process that compresses a network, imports included."""
    command = [sys.executable, "-c", APPLY, net, method, str(samples), str(size)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@both_methods
def test_memory_does_not_grow_with_the_samples(method):
    # Two megabytes a map and example: with the fewer samples, what may wait is full already. Unbounded, the
    # others would add three maps each; the allocator leaves gaps that come to a part of that.
    few, many = (_peak("wide maps", method, samples=samples, size=128) for samples in (96, 192))
    assert many - few < 96 * 3 * 2**21 / 2


@both_methods
def test_vgg16_at_224_pixels_stays_under_four_gigabytes(method):
    # What 512 samples take beyond these 16: the samples themselves; the rows of the layer behind the flatten,
    # in float32 for the choice and for the refit, in float64 for the surgeon; and the rest of the memory that
    # passes may wait in.
    data = (512 - 16) * (3 * 224**2 * 4 + 25088 * (4 + 4 + 8)) + 2**27
    assert _peak("vgg16_bn", method, samples=16, size=224) + data < 4e9
