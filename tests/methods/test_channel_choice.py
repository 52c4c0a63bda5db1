"""Which channels stay does not depend on how the work is divided."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from compress_search.methods import METHODS
from compress_search.methods.channel_choice import choose_blocks, largest_blocks

_spec = importlib.util.spec_from_file_location("zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(zoo)


def test_groups_whose_gram_matrices_do_not_fit_together_are_chosen_one_by_one(monkeypatch):
    model = zoo.build("Grouped")
    groups = METHODS["channel_pruning"].analyse(model, torch.zeros(zoo.EXAMPLE_SHAPE)).coupling.groups
    batches = [torch.randn(8, *zoo.EXAMPLE_SHAPE[1:]) for _ in range(3)]
    sizes = {group.name: max(1, group.size // 2) for group in groups}
    protected = {group.name: () for group in groups}
    together = choose_blocks(model, groups, sizes, batches, protected=protected)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    monkeypatch.setattr("compress_search.methods.channel_choice._GRAM_ELEMENTS", 1)
    assert choose_blocks(model, groups, sizes, batches, protected=protected) == together
    # For each group one to measure and three batches; one group feeds a transposed convolution alone.
    assert len(runs) == (len(groups) - 1) * 4 > 4


def test_without_data_the_channels_of_the_largest_weights_stay(monkeypatch):
    monkeypatch.setattr("compress_search.methods.channel_choice._OUTPUTS_AT_A_TIME", 3)
    model = zoo.build("Residual")
    groups = METHODS["channel_pruning"].analyse(model, torch.zeros(zoo.EXAMPLE_SHAPE)).coupling.groups
    (group,) = [group for group in groups if group.name == "conv1"]
    scores = sum(
        model.get_submodule(name).weight.detach().double().square().sum(dim=axes)
        / model.get_submodule(name).weight.detach().double().square().sum()
        for name, axes in (("conv1", (1, 2, 3)), ("conv2", (0, 2, 3)))
    )
    assert largest_blocks(model, group, 3, ()) == tuple(sorted(scores.topk(3).indices.tolist()))
