"""Every method on the networks of torchvision, at half the MACs, with the laws of the contract."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from compress_search.methods import METHODS
from compress_search.plan import CompressionPlan, apply_plan
from compress_search.profile import inference_mode_of, profile_model
from compress_search.selection.uniform import select_uniform

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CNNS = {
    "alexnet": 224,
    "vgg16_bn": 64,
    "resnet18": 64,
    "resnet50": 64,
    "wide_resnet50_2": 64,
    "resnext50_32x4d": 64,
    "densenet121": 64,
    "squeezenet1_1": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "mobilenet_v2": 64,
    "mobilenet_v3_large": 64,
    "mnasnet1_0": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "regnet_y_400mf": 64,
    "shufflenet_v2_x1_0": 64,
    "convnext_tiny": 64,
    "fcn_resnet50": 64,
    "deeplabv3_resnet50": 64,
}
TRANSFORMERS = {"swin_t": 64, "vit_b_16": 224}
CASES = [(net, method) for net in CNNS for method in METHODS] + [(net, "weight_svd") for net in TRANSFORMERS]

DATA_AWARE = {
    "resnet18": 64,
    "googlenet": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_large": 64,
    "mnasnet1_0": 64,
    "squeezenet1_1": 64,
    # The largest of them by far.
    "convnext_tiny": 32,
}
"""One network a family whose data-aware compression takes at most a minute or so."""
DATA_AWARE_CASES = [(net, method) for net in DATA_AWARE for method in METHODS]

SMALLEST = {
    # What spatial SVD can reach on a net of linear layers with a few depthwise kernels; all others reach 0.5.
    ("convnext_tiny", "spatial_svd"): 0.95,
}
IGNORED = {
    # Their fully connected layers take a minute each to factorise.
    ("alexnet", "weight_svd"): ["classifier"],
    ("vgg16_bn", "weight_svd"): ["classifier"],
}


def _build(name: str, *, auxiliary: bool = False, size: int | None = None) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    extra: dict[str, object] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        extra |= {"init_weights": False, "aux_logits": auxiliary}
    if name in ("fcn_resnet50", "deeplabv3_resnet50"):
        extra |= {"weights_backbone": None}
    model: nn.Module = torchvision.models.get_model(name, **extra).eval()
    if size is None:
        # What the second head of Inception needs.
        size = 299 if name == "inception_v3" and auxiliary else (CNNS | TRANSFORMERS)[name]
    return model, torch.randn(1, 3, size, size)


def _outputs(model: Callable[[torch.Tensor], object], inputs: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(inputs)) if isinstance(leaf, torch.Tensor)]


def _batches(example: torch.Tensor) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, *example.shape[1:], generator=generator) for _ in range(3)]


def _check_the_laws(
    net: str, method: str, model: nn.Module, example: torch.Tensor, batches: list[torch.Tensor]
) -> nn.Module:
    """Compress by half, check what the contract says, and return the compressed model."""
    analysis = METHODS[method].analyse(model, example, ignore=IGNORED.get((net, method), []))
    ratio = SMALLEST.get((net, method), 0.5)
    sizes = select_uniform(analysis, ratio)
    compressed = analysis.apply(sizes, batches)

    assert profile_model(compressed.model, example).macs == analysis.predict_macs(sizes)
    assert sum(p.numel() for p in compressed.model.parameters()) == analysis.predict_params(sizes)
    assert 0.9 * ratio < compressed.step.mac_ratio <= ratio
    outputs = _outputs(compressed.model, example)
    assert [o.shape for o in outputs] == [o.shape for o in _outputs(model, example)]
    assert all(torch.isfinite(output).all() for output in outputs)

    plan = json.loads(json.dumps(CompressionPlan((compressed.step,)).to_dict()))
    replayed = apply_plan(model, CompressionPlan.from_dict(plan))
    replayed.load_state_dict(compressed.model.state_dict())
    for again, output in zip(_outputs(replayed, example), outputs, strict=True):
        assert torch.equal(again, output)
    return compressed.model


@pytest.mark.parametrize(("net", "method"), CASES)
def test_half_the_macs(net, method):
    model, example = _build(net)
    _check_the_laws(net, method, model, example, [])


@pytest.mark.parametrize(("net", "method"), DATA_AWARE_CASES)
def test_half_the_macs_with_calibration_data(net, method):
    model, example = _build(net, size=DATA_AWARE[net])
    _check_the_laws(net, method, model, example, _batches(example))


@pytest.mark.parametrize("net", ["googlenet", "inception_v3"])
def test_auxiliary_heads_still_fit_in_training(net):
    model, example = _build(net, auxiliary=True)
    compressed = _check_the_laws(net, "channel_pruning", model, example, [])
    inputs = torch.cat([example, -example])
    trained, wanted = _outputs(compressed.train(), inputs), _outputs(model.train(), inputs)
    assert len(trained) == {"googlenet": 3, "inception_v3": 2}[net]
    assert [t.shape for t in trained] == [t.shape for t in wanted]


@pytest.mark.parametrize("net", CNNS | TRANSFORMERS)
def test_macs_are_half_the_flops_of_pytorchs_counter(net, monkeypatch):
    model, example = _build(net)
    profile = profile_model(model, example)
    counter = FlopCounterMode(display=False)
    # Attention fused into one operation hides its linear layers from the counter.
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    with counter, inference_mode_of(model):
        model(example)
    flops = {
        f"{module} ({operation})": count
        for module, operations in counter.get_flop_counts().items()
        for operation, count in operations.items()
    }
    total = sum(count for name, count in flops.items() if name.startswith("Global "))
    # Attention multiplies activations with each other, and with weights that are no layer's: it is named, not
    # counted, and is the whole difference.
    uncounted = sum(flops[f"{type(model).__name__}.{name}"] for name in profile.uncounted)
    assert bool(profile.uncounted) == (net in TRANSFORMERS)
    assert 2 * profile.macs == total - uncounted
