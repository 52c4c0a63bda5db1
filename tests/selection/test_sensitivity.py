"""The sensitivity table: its numbers are those of really compressing one unit, and none is measured twice."""

from __future__ import annotations

import copy
import json
import logging
import math
from functools import partial

import pytest
import torch
from torch import nn

from compress_search.calibration import divergence
from compress_search.compression import (
    TableSource,
    analyse,
    choose_sizes,
    compress,
    last_samples,
    measure_sensitivity,
    sensitivity_table,
)
from compress_search.exceptions import ConfigError, EvaluationError, RatioError, WorkspaceError
from compress_search.methods import channel_choice, factorisation
from compress_search.methods.method import Imitation
from compress_search.profile import profile_model
from compress_search.progress import Progress
from compress_search.recipe import Compress
from compress_search.selection import sensitivity
from compress_search.selection.table import Cell, SensitivityTable
from compress_search.selection.table_store import TableStore
from compress_search.workspace import Workspace

METHODS = ("spatial_svd", "weight_svd", "channel_pruning")


class Net(nn.Module):
    """A residual block, a grouped convolution and biases, so that each kind of consumer is there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.two = nn.Conv2d(12, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        x = torch.relu(self.stem(images))
        x = torch.relu(x + self.two(torch.relu(self.norm(self.one(x)))))
        return self.head(torch.relu(self.grouped(x)).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def batches():
    # Smooth images, so that inputs are correlated and some channels are missed less than others.
    draw = torch.randn(96, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    return list(nn.functional.avg_pool2d(draw, 3, stride=1, padding=1).split(16))


def stage(method, **changes):
    return Compress(method=method, mac_ratio=0.6, scoring_samples=48, **changes)


def alone(analysis, unit, size, batches):
    """The slow road: build the model in which one unit alone is compressed, and refit nothing after it."""
    changed = copy.deepcopy(analysis.model)
    (imitation,) = analysis.imitations({unit: [size]}, batches)
    with torch.no_grad():
        for name, value in imitation.parameters[size].items():
            changed.get_parameter(name).copy_(value)
    return changed


@pytest.mark.parametrize("method", METHODS)
def test_each_loss_is_the_divergence_of_a_model_with_that_unit_compressed(method, net, batches):
    analysis = analyse(net, batches[0][:1], stage(method))
    table = sensitivity_table(analysis, stage(method, probes=10), TableSource(batches))
    assert table.units == tuple(unit.name for unit in analysis.units)
    assert all(cell.measured for cell in table.cells)
    for cell in table.cells:
        slow = divergence(alone(analysis, cell.unit, cell.size, batches), net, last_samples(batches, 48))
        assert cell.loss == pytest.approx(slow, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_without_data_the_imitation_is_the_compressed_model(method, net, batches):
    analysis = analyse(net, batches[0][:1], stage(method))
    for unit in analysis.units:
        size = max(1, unit.full_size // 2)
        built = analysis.apply({unit.name: size}, []).model
        with torch.no_grad():
            wanted = built(batches[0])
            given = alone(analysis, unit.name, size, [])(batches[0])
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


class SharedWeight(nn.Module):
    """Two layers that share a weight; each has its own once one of them is compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(m, 8, 3, padding=1) for m in (3, 8, 8))
        self.two.weight = self.one.weight
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        x = torch.relu(self.one(torch.relu(self.stem(images))))
        return self.head(torch.relu(self.two(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("measure", ["divergence", "score"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_shares_its_weight_is_compressed_without_the_other(method, measure, batches):
    torch.manual_seed(0)
    net = SharedWeight().eval()
    analysis = analyse(net, batches[0][:1], stage(method))
    settings = {"known": {}, "found": lambda cells: None, "progress": Progress()}
    if measure == "divergence":
        cells = sensitivity.measure_by_divergence(analysis, [], batches, probes=10, **settings)
    else:
        score = partial(_minus_divergence, net, batches)
        cells = sensitivity.measure_by_score(analysis, [], score, on_error="stop", **settings)
    for cell in cells:
        built = analysis.apply({cell.unit: cell.size}, []).model
        assert cell.loss == pytest.approx(divergence(built, net, batches), rel=1e-3, abs=1e-9)


def _minus_divergence(net, batches, model):
    return -divergence(model, net, batches)


def test_the_imitation_of_pruning_is_what_refitting_the_consumers_alone_gives(net, batches):
    # Nothing follows the head, so here the refit of what follows is the refit of the consumers.
    analysis = analyse(net, batches[0][:1], stage("channel_pruning"))
    last = analysis.units[-1]
    assert last.name == "grouped"
    size = last.full_size // 2
    built = analysis.apply({last.name: size}, batches).model
    imitated = alone(analysis, last.name, size, batches)
    assert divergence(imitated, built, batches) < 0.05 * divergence(imitated, net, batches)


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_to_the_bit_those_of_prefixes_that_start_anew(method, net, batches, monkeypatch):
    monkeypatch.setattr(sensitivity, "_INPUT_ELEMENTS", 1)  # Several batches, which take turns.
    analysis = analyse(net, batches[0][:1], stage(method))
    going_on = sensitivity_table(analysis, stage(method), TableSource(batches))
    monkeypatch.setattr("compress_search.replay._KEPT_BYTES", -1)
    assert sensitivity_table(analysis, stage(method), TableSource(batches)) == going_on


@pytest.mark.parametrize("method", METHODS)
def test_errors_fall_with_the_size(method, net, batches):
    analysis = analyse(net, batches[0][:1], stage(method))
    sizes = {unit.name: sensitivity.candidate_sizes(analysis, unit) for unit in analysis.units}
    for imitation in analysis.imitations(sizes, batches):
        errors = [imitation.errors[size] for size in sorted(imitation.errors)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] >= -1e-9


@pytest.mark.parametrize("method", METHODS)
def test_three_probes_tell_nearly_what_all_ten_do(method, net, batches):
    analysis = analyse(net, batches[0][:1], stage(method))
    few, all_ten = (
        sensitivity_table(analysis, stage(method, probes=probes), TableSource(batches)) for probes in (3, 10)
    )
    assert [(c.unit, c.size) for c in few.cells] == [(c.unit, c.size) for c in all_ten.cells]
    assert sum(cell.measured for cell in few.cells) <= 3 * len(few.units)
    for few_cell, cell in zip(few.cells, all_ten.cells, strict=True):
        if few_cell.measured:
            assert few_cell == cell
    logarithms = [
        abs(math.log(max(a.loss, 1e-9) / max(b.loss, 1e-9)))
        for a, b in zip(few.cells, all_ten.cells, strict=True)
        if not a.measured
    ]
    assert sum(logarithms) / len(logarithms) < 0.7


def test_a_loss_that_is_a_power_of_the_error_is_filled_in_exactly():
    errors = {size: 0.9**size for size in range(1, 11)}
    imitation = Imitation("a", {}, errors)
    for probed in ([2, 5, 9], [5, 6], [1, 10]):
        cells = sensitivity.filled_in(imitation, {size: 3 * errors[size] ** 1.7 for size in probed})
        assert [cell.size for cell in cells if cell.measured] == probed
        for cell in cells:
            assert cell.loss == pytest.approx(3 * errors[cell.size] ** 1.7)
    # One probe alone: proportional to the error.
    cells = sensitivity.filled_in(imitation, {5: 2 * errors[5]})
    assert all(cell.loss == pytest.approx(2 * errors[cell.size]) for cell in cells)


def test_small_batches_of_one_shape_are_joined():
    small, other = torch.zeros(2, 3), torch.ones(2, 4)
    large = torch.zeros(2**19, 1)
    assert [len(batch) for batch in sensitivity.merged([small, small, other, large, large])] == [
        4,
        2,
        2**19,
        2**19,
    ]


def test_probes_are_spread_and_none_is_taken_twice():
    assert sensitivity.spread([1, 2, 3, 4, 5, 6, 7, 8, 9], 3) == [2, 5, 8]
    assert sensitivity.spread([1, 2], 3) == [1, 2]
    assert sensitivity.spread([4], 3) == [4]


def test_candidates_are_ten_per_cent_apart(net, batches):
    analysis = analyse(net, batches[0][:1], stage("channel_pruning"))
    by_name = {unit.name: unit for unit in analysis.units}
    assert sensitivity.candidate_sizes(analysis, by_name["one"]) == (1, 2, 3, 4, 6, 7, 8, 9, 10)


def test_without_data_the_errors_of_the_layers_stand_for_losses(net, batches):
    table = measure_sensitivity(net, batches[0][:1], [], stage("spatial_svd", samples=0))
    assert all(0 <= cell.loss <= 1 for cell in table.cells)
    assert any(cell.loss > 0.01 for cell in table.cells)
    compressed = compress(net, batches[0][:1], [], stage("spatial_svd", samples=0))
    ratio = profile_model(compressed.model, batches[0][:1]).mac_ratio(profile_model(net, batches[0][:1]))
    assert 0.57 < ratio <= 0.6


@pytest.mark.parametrize("method", METHODS)
def test_optimal_sizes_diverge_less_than_uniform_ones(method, batches):
    # One half of the network matters, the other next to nothing: equal shares are a bad idea here.
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.two.weight.mul_(0.01)
    found = {
        name: divergence(
            compress(model, batches[0][:1], batches, stage(method, selection=name)).model, model, batches
        )
        for name in ("optimal", "uniform")
    }
    assert found["optimal"] < found["uniform"]


@pytest.mark.parametrize("method", METHODS)
def test_what_choosing_has_computed_applying_does_not_compute_again(method, net, batches, monkeypatch):
    chosen = analyse(net, batches[0][:1], stage(method))
    sizes = {unit.name: max(1, unit.full_size // 2) for unit in chosen.units}
    fresh = analyse(net, batches[0][:1], stage(method)).apply(sizes, batches)
    for _ in chosen.imitations({name: [size] for name, size in sizes.items()}, batches):
        pass
    for module in (factorisation, channel_choice):
        monkeypatch.setattr(module, "gram_matrices", None)
    again = chosen.apply(sizes, list(batches))
    assert again.step == fresh.step
    with torch.no_grad():
        torch.testing.assert_close(again.model(batches[0]), fresh.model(batches[0]), rtol=1e-3, atol=1e-4)
    # Other batches are other data.
    with pytest.raises(TypeError):
        chosen.apply(sizes, [batch.clone() for batch in batches])


class Counting:
    """A score that counts its calls, and fails where it is told to."""

    def __init__(self, fail_at=None, result=float("nan")):
        self.calls, self.fail_at, self.result = 0, fail_at, result

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.fail_at:
            return self.result
        with torch.no_grad():
            return float(-model(torch.ones(1, 3, 8, 8)).square().sum())


def by_score(**changes):
    return stage("spatial_svd", sensitivity="score", **changes)


def test_a_score_gives_drops(net, batches):
    score = Counting()
    table = measure_sensitivity(net, batches[0][:1], batches, by_score(), score=score)
    assert score.calls == len(table.cells) + 1
    analysis = analyse(net, batches[0][:1], by_score())
    for cell in table.cells[:5]:
        drop = Counting()(net) - Counting()(alone(analysis, cell.unit, cell.size, batches))
        assert cell.loss == pytest.approx(drop, rel=1e-4, abs=1e-7)


def test_a_cell_that_fails_is_named_and_the_others_are_kept(net, batches, tmp_path):
    store = TableStore(Workspace(tmp_path))
    analysis = analyse(net, batches[0][:1], by_score())
    first = TableSource(batches, score=Counting(fail_at=6), store=store)
    with pytest.raises(EvaluationError, match=r"The score of the cell 'stem' at size 5 .*it returned nan"):
        sensitivity_table(analysis, by_score(), first)
    again = Counting()
    table = sensitivity_table(analysis, by_score(), TableSource(batches, score=again, store=store))
    # Four cells were measured before the failure; the whole model is scored anew.
    assert again.calls == 1 + len(table.cells) - 4


def test_a_cell_that_fails_can_be_left_out(net, batches, caplog):
    whole = measure_sensitivity(net, batches[0][:1], batches, by_score(), score=Counting())
    with caplog.at_level(logging.WARNING, "compress_search"):
        table = measure_sensitivity(
            net, batches[0][:1], batches, by_score(on_cell_error="skip"), score=Counting(fail_at=6)
        )
    assert len(table.cells) == len(whole.cells) - 1
    assert "'stem' at size 5 failed" in caplog.text


def test_a_score_that_is_missing_is_asked_for(net, batches):
    with pytest.raises(ConfigError, match="there is no score"):
        measure_sensitivity(net, batches[0][:1], batches, by_score())


def test_a_stored_table_is_not_measured_again(net, batches, tmp_path, monkeypatch):
    source = TableSource(batches, data="d", store=TableStore(Workspace(tmp_path)))
    analysis = analyse(net, batches[0][:1], stage("spatial_svd"))
    table = sensitivity_table(analysis, stage("spatial_svd"), source)
    monkeypatch.setattr("compress_search.replay.Prefix", None)
    assert sensitivity_table(analysis, stage("spatial_svd"), source) == table
    # Another ratio, rounding or selection asks for the same table.
    other = Compress(method="spatial_svd", mac_ratio=0.8, round_to=2, selection="greedy", scoring_samples=48)
    assert sensitivity_table(analysis, other, source) == table


def test_an_interrupted_table_goes_on_where_it_stopped(net, batches, tmp_path, monkeypatch):
    store = TableStore(Workspace(tmp_path))
    source = TableSource(batches, store=store)
    analysis = analyse(net, batches[0][:1], stage("spatial_svd"))
    whole = sensitivity_table(analysis, stage("spatial_svd"), TableSource(batches))
    append = TableStore.append

    def killed(self, identity, cells):
        if cells[0].unit == "two":
            raise KeyboardInterrupt
        append(self, identity, cells)

    with monkeypatch.context() as patch:
        patch.setattr(TableStore, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            sensitivity_table(analysis, stage("spatial_svd"), source)
    measured = []
    monkeypatch.setattr(
        TableStore, "append", lambda s, i, cells: measured.append(cells[0].unit) or append(s, i, cells)
    )
    assert sensitivity_table(analysis, stage("spatial_svd"), source) == whole
    assert measured == ["two", "grouped"]


@pytest.mark.parametrize("damage", ["torn", "changed", "binary"])
def test_damaged_lines_are_measured_again_and_reported(damage, net, batches, tmp_path, caplog):
    store = TableStore(Workspace(tmp_path))
    source = TableSource(batches, store=store)
    analysis = analyse(net, batches[0][:1], stage("spatial_svd"))
    whole = sensitivity_table(analysis, stage("spatial_svd"), source)
    (file,) = tmp_path.glob("tables/*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    if damage == "torn":
        file.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    elif damage == "changed":
        value = json.loads(lines[3]) | {"loss": 0.0}
        file.write_bytes(b"".join([*lines[:3], json.dumps(value).encode() + b"\n", *lines[4:]]))
    else:
        file.write_bytes(b"".join([*lines[:3], b"\xff\x00\n", *lines[4:]]))
    with caplog.at_level(logging.WARNING, "compress_search"):
        again = sensitivity_table(analysis, stage("spatial_svd"), source)
    assert [(c.unit, c.size) for c in again.cells] == [(c.unit, c.size) for c in whole.cells]
    assert all(
        a.loss == pytest.approx(w.loss, rel=1e-5) for a, w in zip(again.cells, whole.cells, strict=True)
    )
    assert "1 lines" in caplog.text


def test_the_table_of_another_model_is_refused(net, batches):
    table = measure_sensitivity(net, batches[0][:1], batches, stage("spatial_svd"))
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.stem.bias.add_(1.0)
    with pytest.raises(ConfigError, match="measured on another model, method or selection of layers"):
        compress(other, batches[0][:1], batches, stage("spatial_svd"), table=table)
    with pytest.raises(ConfigError, match="measured on another model, method or selection of layers"):
        compress(net, batches[0][:1], batches, stage("weight_svd"), table=table)
    assert compress(net, batches[0][:1], batches, stage("spatial_svd"), table=table).step.edits


def test_a_given_table_is_used(net, batches):
    analysis = analyse(net, batches[0][:1], stage("spatial_svd"))
    table = measure_sensitivity(net, batches[0][:1], batches, stage("spatial_svd"))
    # With a table that calls one layer sacred, that layer keeps more than the measured table lets it.
    cells = tuple(Cell(c.unit, c.size, c.loss * (1e6 if c.unit == "one" else 1.0)) for c in table.cells)
    sacred = SensitivityTable(cells, table.fingerprint)
    source = TableSource(batches)
    usual = choose_sizes(analysis, stage("spatial_svd"), source, table=table)
    other = choose_sizes(analysis, stage("spatial_svd"), source, table=sacred)
    full = {unit.name: unit.full_size for unit in analysis.units}
    assert other.get("one", full["one"]) > usual.get("one", full["one"])


@pytest.mark.parametrize("selection", ["optimal", "greedy", "greedy_monotonic"])
def test_a_ratio_out_of_reach_is_known_before_a_table_is_measured(selection, net, batches, tmp_path):
    tables = TableStore(Workspace(tmp_path).prepare())
    asked = Compress(method="spatial_svd", mac_ratio=0.01, selection=selection)
    with pytest.raises(RatioError, match="the smallest reachable is") as caught:
        choose_sizes(analyse(net, batches[0][:1], asked), asked, TableSource(batches, store=tables))
    assert not list(tmp_path.rglob("*.jsonl"))
    # No layer of no cost is blamed.
    assert "0.0% of the MACs" not in str(caught.value)


def test_a_table_as_frame_json_and_csv(tmp_path):
    table = SensitivityTable((Cell("a", 1, 0.5), Cell("a", 3, 0.25), Cell("b", 2, 0.0, measured=False)), "f")
    table.save(tmp_path / "table.json")
    assert SensitivityTable.load(tmp_path / "table.json") == table
    table.save(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().splitlines() == [
        "unit,size,loss,measured",
        "a,1,0.5,True",
        "a,3,0.25,True",
        "b,2,0.0,False",
    ]
    frame = table.to_dataframe()
    assert frame.dtypes.astype(str).to_dict() == {
        "unit": "string",
        "size": "int64",
        "loss": "float64",
        "measured": "bool",
    }
    assert frame["loss"].tolist() == [0.5, 0.25, 0.0]
    assert table.losses("a") == {1: 0.5, 3: 0.25}
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(WorkspaceError, match="holds no sensitivity table"):
        SensitivityTable.load(tmp_path / "no.json")


def test_only_the_last_samples_are_scored():
    batches = [torch.arange(4).float(), torch.arange(4, 8).float(), torch.arange(8, 10).float()]
    assert torch.cat(last_samples(batches, 5)).tolist() == [5, 6, 7, 8, 9]
    assert torch.cat(last_samples(batches, 99)).tolist() == list(range(10))
