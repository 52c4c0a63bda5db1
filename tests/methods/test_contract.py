"""The laws that every method keeps, on every network of the zoo."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from compress_search.calibration import divergence
from compress_search.compression import compress, measure_sensitivity
from compress_search.exceptions import ModelError
from compress_search.fingerprint import model_fingerprint
from compress_search.methods import METHODS
from compress_search.methods.method import Compressed
from compress_search.plan import CompressionPlan, apply_plan
from compress_search.profile import COUNTED_LAYERS, profile_model
from compress_search.recipe import Compress
from compress_search.selection.uniform import select_uniform

_spec = importlib.util.spec_from_file_location("zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(zoo)

EXAMPLE = torch.zeros(zoo.EXAMPLE_SHAPE)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_net = pytest.mark.parametrize("net", zoo.ZOO)
with_and_without_data = pytest.mark.parametrize("samples", [0, 64], ids=["data-free", "data-aware"])


def _batches(samples: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(16, *zoo.EXAMPLE_SHAPE[1:], generator=generator) for _ in range(samples // 16)]


@every_method
@every_net
@with_and_without_data
def test_half_the_macs(method, net, samples):
    model = zoo.build(net)
    fingerprint = model_fingerprint(model)
    analysis = method.analyse(model, EXAMPLE)
    sizes = select_uniform(analysis, 0.5)
    compressed = analysis.apply(sizes, _batches(samples))

    counted = profile_model(compressed.model, EXAMPLE)
    assert counted.macs == analysis.predict_macs(sizes)
    assert counted.params == analysis.predict_params(sizes)
    assert compressed.step.mac_ratio == counted.macs / analysis.profile.macs
    assert 0.35 < compressed.step.mac_ratio <= 0.5
    inputs = torch.randn(2, *zoo.EXAMPLE_SHAPE[1:])
    with torch.no_grad():
        outputs = compressed.model(inputs)
        assert outputs.shape == model(inputs).shape
    assert torch.isfinite(outputs).all()
    assert model_fingerprint(model) == fingerprint, "the user's model was changed"

    plan = CompressionPlan((compressed.step,))
    replayed = apply_plan(model, CompressionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))))
    replayed.load_state_dict(compressed.model.state_dict())
    with torch.no_grad():
        assert torch.equal(replayed(inputs), outputs)

    # What only training uses, such as an auxiliary head, still fits.
    trained, wanted = compressed.model.train()(inputs), copy.deepcopy(model).train()(inputs)
    assert [t.shape for t in tree_leaves(trained)] == [t.shape for t in tree_leaves(wanted)]


def _half(analysis):
    return select_uniform(analysis, 0.5)


def _smallest(analysis):
    return {unit.name: unit.least for unit in analysis.units}


@every_method
@every_net
@pytest.mark.parametrize("choose", [_half, _smallest])
def test_units_compressed_one_after_the_other_give_what_all_at_once_give(method, net, choose):
    model = zoo.build(net)
    analysis = method.analyse(model, EXAMPLE)
    sizes = choose(analysis)
    batches = _batches(32)
    at_once = analysis.apply(sizes, batches)
    if choose is _smallest:
        # That data do not mind how far the others are, the halves show; here it is the shapes that matter.
        batches = []
    one_by_one = Compressed(model, dataclasses.replace(at_once.step, edits=()))
    done: dict[str, int] = {}
    for unit in analysis.units:
        if unit.name not in sizes:
            continue
        view = analysis.after(one_by_one, EXAMPLE)
        done[unit.name] = sizes[unit.name]
        assert unit in view.units
        compressed = view.apply({unit.name: sizes[unit.name]}, batches)
        edits = (*one_by_one.step.edits, *compressed.step.edits)
        one_by_one = Compressed(compressed.model, dataclasses.replace(one_by_one.step, edits=edits))
        _train_a_little(one_by_one.model)
        counted = profile_model(one_by_one.model, EXAMPLE)
        assert counted.macs == analysis.predict_macs(done)
        assert counted.params == analysis.predict_params(done)
    shapes = [{n: t.shape for n, t in c.model.state_dict().items()} for c in (one_by_one, at_once)]
    assert shapes[0] == shapes[1]

    plan = CompressionPlan((one_by_one.step,))
    replayed = apply_plan(model, CompressionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))))
    replayed.load_state_dict(one_by_one.model.state_dict())
    inputs = torch.randn(2, *zoo.EXAMPLE_SHAPE[1:])
    with torch.no_grad():
        assert torch.equal(replayed(inputs), one_by_one.model(inputs))


def _train_a_little(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape))


@every_method
@every_net
@with_and_without_data
def test_full_size_reproduces_the_dense_output(method, net, samples):
    model = zoo.build(net)
    analysis = method.analyse(model, EXAMPLE)
    sizes = {unit.name: unit.full_size for unit in analysis.units}
    compressed = analysis.apply(sizes, _batches(samples))
    assert profile_model(compressed.model, EXAMPLE).macs == analysis.predict_macs(sizes)
    inputs = torch.randn(2, *zoo.EXAMPLE_SHAPE[1:])
    with torch.no_grad():
        torch.testing.assert_close(compressed.model(inputs), model(inputs), rtol=1e-4, atol=1e-4)


@every_method
@every_net
def test_data_helps(method, net):
    model = zoo.build(net)
    analysis = method.analyse(model, EXAMPLE)
    sizes = select_uniform(analysis, 0.5)
    batches = _batches(256)
    aware, free = (analysis.apply(sizes, data).model for data in (batches, []))
    assert divergence(aware, model, batches) < divergence(free, model, batches)


@every_method
@every_net
def test_every_counted_layer_is_a_unit_s_or_has_a_reason(method, net):
    model = zoo.build(net)
    analysis = method.analyse(model, EXAMPLE)
    sized = {layer for unit in analysis.units for layer in unit.layers}
    counted = {name for name, module in model.named_modules() if isinstance(module, COUNTED_LAYERS)}
    assert counted == sized | set(analysis.left_alone)
    assert all(analysis.left_alone.values())


@every_net
def test_macs_are_half_the_flops_of_pytorchs_counter(net):
    model = zoo.build(net)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(EXAMPLE)
    profile = profile_model(model, EXAMPLE)
    assert profile.uncounted == ()
    assert 2 * profile.macs == counter.get_total_flops()


@every_method
@every_net
def test_sizes_are_monotone_in_the_share(method, net):
    analysis = method.analyse(zoo.build(net), EXAMPLE)
    for unit in analysis.units:
        sizes = [analysis.size_at(unit, share / 20) for share in range(1, 21)]
        assert sizes == sorted(sizes)
        assert sizes[0] >= 1 and sizes[-1] <= unit.full_size


@every_method
def test_an_ignored_layer_keeps_its_channels_and_says_so(method):
    model = zoo.build("Residual")
    analysis = method.analyse(model, EXAMPLE, ignore=["conv1"])
    assert analysis.left_alone["conv1"].startswith("you asked")
    compressed = analysis.apply(select_uniform(analysis, 0.6), []).model
    assert compressed.conv1.out_channels == model.conv1.out_channels


@every_method
@pytest.mark.parametrize("size", [0, 10_000])
def test_a_size_that_does_not_fit_is_refused(method, size):
    analysis = method.analyse(zoo.build("Residual"), EXAMPLE)
    with pytest.raises(ModelError, match=str(size)):
        analysis.apply({analysis.units[0].name: size}, [])


@every_method
def test_weights_that_are_not_finite_are_refused(method):
    model = copy.deepcopy(zoo.build("Residual"))
    model.stem.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match=r"'stem.weight' are not finite"):
        method.analyse(model, EXAMPLE)


@every_method
def test_activations_that_are_not_finite_are_refused(method):
    analysis = method.analyse(zoo.build("Residual"), EXAMPLE)
    with pytest.raises(ModelError, match="are not finite"):
        analysis.apply(select_uniform(analysis, 0.5), [torch.full((4, *zoo.EXAMPLE_SHAPE[1:]), torch.inf)])


@every_method
def test_training_mode_and_gradients_of_the_users_model_stay(method):
    model = zoo.build("Residual").train()
    model.head.weight.requires_grad_(False)
    analysis = method.analyse(model, EXAMPLE)
    compressed = analysis.apply(select_uniform(analysis, 0.5), _batches(32)).model
    assert model.training and model.bn.training
    assert not model.head.weight.requires_grad
    assert not compressed.training


@every_method
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_are_kept(method, precision):
    model = zoo.build("Residual").to(precision)
    batches = [batch.to(precision) for batch in _batches(128)]
    analysis = method.analyse(model, EXAMPLE.to(precision))
    compressed = analysis.apply(select_uniform(analysis, 0.6), batches).model
    assert {parameter.dtype for parameter in compressed.parameters()} == {precision}
    free = analysis.apply(select_uniform(analysis, 0.6), []).model
    assert divergence(compressed, model, batches) < divergence(free, model, batches)


@every_method
def test_a_model_on_several_devices_is_refused(method):
    model = zoo.build("Residual")
    model.head = model.head.to("meta")
    with pytest.raises(ModelError, match=r"several devices \(cpu, meta\)"):
        method.analyse(model, EXAMPLE)


@every_method
def test_too_few_samples_are_warned_of_and_still_give_a_finite_model(method, caplog):
    model = zoo.build("Concatenation")
    analysis = method.analyse(model, EXAMPLE)
    few = [batch[:1] for batch in _batches(32)]
    compressed = analysis.apply(select_uniform(analysis, 0.5), few).model
    assert "fewer calibration rows than input features in: " in caplog.text
    assert all(torch.isfinite(parameter).all() for parameter in compressed.parameters())


@every_method
def test_the_same_data_gives_the_same_model(method):
    model = zoo.build("Residual")
    fingerprints = set()
    for _ in range(2):
        analysis = method.analyse(model, EXAMPLE)
        compressed = analysis.apply(select_uniform(analysis, 0.5), _batches(64))
        fingerprints.add(model_fingerprint(compressed.model))
    assert len(fingerprints) == 1


@dataclasses.dataclass
class Outputs:
    logits: torch.Tensor
    note: str = "of which PyTorch was not told"


class InADataclass(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return Outputs(self.inner(x))


@every_method
def test_outputs_in_a_dataclass_are_seen(method):
    tables, divergences = [], []
    for model in (zoo.build("Residual"), InADataclass(zoo.build("Residual")).eval()):
        stage = Compress(method=method.name, mac_ratio=0.5)
        table = measure_sensitivity(model, EXAMPLE, _batches(32), stage)
        tables.append([(cell.unit.removeprefix("inner."), cell.size, cell.loss) for cell in table.cells])
        compressed = compress(model, EXAMPLE, _batches(32), stage, table=table)
        divergences.append(divergence(compressed.model, model, _batches(32)))
    assert tables[0] == tables[1]
    assert divergences[0] == divergences[1] > 0.0
