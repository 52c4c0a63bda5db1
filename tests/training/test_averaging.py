"""The moving average against its recursion."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_search.training.averaging import averaged_copy


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_it_follows_its_recursion(decay):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    averaged = averaged_copy(model, decay)
    wanted = {}
    for step in range(6):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(torch.rand(tensor.shape) if tensor.is_floating_point() else 1)
        averaged.update_parameters(model)
        kept = min(decay, (1 + step) / (10 + step)) if step else 0.0
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                wanted[name] = kept * wanted.get(name, 0) + (1 - kept) * value
            else:
                wanted[name] = value.clone()
    for name, value in averaged.module.state_dict().items():
        torch.testing.assert_close(value, wanted[name])
