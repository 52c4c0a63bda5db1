"""Small networks and sensitivity tables whose losses fall with the size, more or less."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from compress_search.methods import METHODS
from compress_search.selection.table import Cell, SensitivityTable


class Chain(nn.Module):
    """Convolutions one after the other; every second one has a skip where the widths allow it."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        pairs = zip([3, *widths], widths, strict=False)
        self.layers = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairs)
        self.head = nn.Linear(widths[-1], 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            y = torch.relu(layer(x))
            x = x + y if number % 2 and x.shape == y.shape else y
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture(scope="session")
def analysed():
    """Analyse a chain of some widths with a method."""

    def analyse(method, widths, **options):
        torch.manual_seed(0)
        return METHODS[method].analyse(Chain(widths).eval(), torch.zeros(1, 3, 8, 8), **options)

    return analyse


@pytest.fixture(scope="session")
def make_table():
    """Make a table of ten candidates a unit, with noise that makes some losses rise with the size."""

    def make(analysis, *, seed=0, noise=0.2):
        draw = np.random.default_rng(seed)
        cells = []
        for unit in analysis.units:
            height, decay = 10 ** draw.uniform(-3, 0), draw.uniform(2, 7)
            sizes = {analysis.size_at(unit, share) for share in np.linspace(0.1, 0.95, 10)}
            for size in sorted(sizes - {None, unit.full_size}):
                loss = height * (np.exp(-decay * size / unit.full_size) - np.exp(-decay))
                cells.append(Cell(unit.name, size, float(loss * np.exp(draw.normal(0, noise)))))
        return SensitivityTable(tuple(cells))

    return make
