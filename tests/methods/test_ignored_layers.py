"""Names and patterns of layers to leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_search.exceptions import ModelError
from compress_search.methods import METHODS
from compress_search.methods.ignored_layers import layers_matching
from compress_search.methods.method import DID_NOT_RUN
from compress_search.profile import profile_model


@pytest.fixture
def profile():
    model = nn.Sequential()
    for name in ("stem", "layer1", "layer10", "head"):
        model.add_module(name, nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)))
    return profile_model(model, torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], set()),
        (["stem.0"], {"stem.0"}),
        (["layer1"], {"layer1.0", "layer1.1"}),
        (["layer1*"], {"layer1.0", "layer1.1", "layer10.0", "layer10.1"}),
        (["*.1", "head"], {"stem.1", "layer1.1", "layer10.1", "head.1", "head.0"}),
    ],
)
def test_names_prefixes_and_patterns(profile, patterns, expected):
    assert layers_matching(patterns, profile) == expected


class WithAuxiliary(nn.Module):
    """A second head that runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.auxiliary = (nn.Conv2d(2, 2, 1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_layer_that_does_not_run_may_be_named(method):
    analysis = method.analyse(WithAuxiliary(), torch.zeros(1, 2, 4, 4), ignore=["auxiliary"])
    assert analysis.left_alone["auxiliary"] == DID_NOT_RUN


def test_names_that_match_nothing_are_all_reported_with_the_nearest(profile):
    with pytest.raises(ModelError) as caught:
        layers_matching(["stemm.0", "zzz", "head.0"], profile)
    assert "'stemm.0'" in str(caught.value) and "Did you mean 'stem.0'" in str(caught.value)
    assert "'zzz'" in str(caught.value) and "Layers: stem.0" in str(caught.value)
    assert "'head.0', which" not in str(caught.value)
