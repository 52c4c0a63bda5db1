"""The benchmarks beside other tools: what passes between processes, what is kept, and the table."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import compress_search
from compress_search.methods.channel_pruning import ChannelPruning
from compress_search.methods.spatial_svd import SpatialSVD
from compress_search.profile import profile_model
from compress_search.replay import Prefix

pytest.importorskip("torchvision", reason="the studies need compress-search[studies]")

ROOT = Path(__file__).parents[1]
SHAPE = (1, 3, 32, 32)


@pytest.fixture(autouse=True)
def _studies(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "studies")


@pytest.fixture
def cases():
    return importlib.import_module("benchmarks.cases")


@pytest.fixture
def networks():
    return importlib.import_module("benchmarks.networks")


@pytest.fixture
def layers():
    return importlib.import_module("benchmarks.layers")


@pytest.fixture
def peer():
    return importlib.import_module("benchmarks.peer")


@pytest.fixture
def running():
    return importlib.import_module("benchmarks.running")


@pytest.fixture
def study():
    return importlib.import_module("benchmarks.ratio_selection")


def resnet20():
    """Our own network, with statistics that are not those of an untrained one."""
    torch.manual_seed(0)
    network = importlib.import_module("cifar10_networks").NETWORKS["resnet20"]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.eval()


def friendly(networks, weights):
    network = networks.PEER_NETWORKS["resnet20"](networks.Add).eval()
    network.load_state_dict(weights)
    return network


# What passes between processes


def test_every_peer_gets_the_network_that_we_have(networks):
    ours = resnet20()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(friendly(networks, ours.state_dict())(images), ours(images))


def test_peer_network_has_a_module_for_every_relu_and_sum(networks):
    kinds = [type(m).__name__ for m in networks.PEER_NETWORKS["resnet20"](networks.Add).modules()]
    assert kinds.count("ReLU") == 1 + 2 * 9
    assert kinds.count("Add") == 9


@pytest.mark.parametrize("steps", [(SpatialSVD,), (ChannelPruning,), (SpatialSVD, ChannelPruning)])
def test_compressed_network_is_built_again_from_its_shapes_and_weights(networks, layers, steps):
    ours = resnet20()
    compressed = ours
    for method in steps:
        analysis = method().analyse(compressed, torch.zeros(SHAPE))
        sizes = {unit.name: max(unit.full_size // 2, 1) for unit in analysis.units}
        compressed = analysis.apply(sizes, []).model.eval()
    described = json.loads(json.dumps([dataclasses.asdict(layer) for layer in layers.layers_of(compressed)]))
    rebuilt = layers.rebuild(friendly(networks, ours.state_dict()), [layers.Layer(**d) for d in described])
    rebuilt.load_state_dict(compressed.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(rebuilt(images), compressed(images))
    macs = profile_model(compressed, torch.zeros(SHAPE)).macs
    assert layers.count_macs(rebuilt, SHAPE) == macs < profile_model(ours, torch.zeros(SHAPE)).macs


def test_layer_that_cannot_be_described_is_refused(layers):
    with pytest.raises(TypeError, match=r"^1 is a PReLU; only Conv2d, Linear, BatchNorm2d"):
        layers.layers_of(nn.Sequential(nn.Linear(2, 2), nn.PReLU()))


def test_judge_refuses_a_network_with_a_change_that_is_no_layer(networks, layers, peer, tmp_path):
    judge = importlib.import_module("benchmarks.judge")
    network, images = resnet20(), torch.randn(peer.PROBES, 3, 32, 32)
    described = [dataclasses.asdict(layer) for layer in layers.layers_of(network)]
    (tmp_path / "layers.json").write_text(json.dumps(described))
    with torch.no_grad():
        probe = network(images)
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file({**weights, peer.PROBE: probe}, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(judge.rebuilt("resnet20", tmp_path, images)(images), probe)
    save_file({**weights, peer.PROBE: torch.relu(probe)}, tmp_path / "model.safetensors")
    with pytest.raises(judge.RebuildError, match="a change that is not in the shapes"):
        judge.rebuilt("resnet20", tmp_path, images)


def test_work_is_counted_in_passes_of_one_image(networks, layers, peer):
    network = friendly(networks, resnet20().state_dict())
    work = peer.Work()
    with work.counted(), torch.no_grad():
        network(torch.zeros(3, 3, 32, 32))
        network(torch.zeros(2, 3, 32, 32))
    network(torch.zeros(SHAPE))
    assert work.macs == 5 * layers.count_macs(network, SHAPE)


def test_layers_that_a_replay_skips_do_no_work(layers, peer):
    network = resnet20()
    whole, last = 2 * layers.count_macs(network, SHAPE), 2 * network[-1].weight.numel()
    work = peer.Work()
    with work.counted():
        prefix = Prefix(network, torch.zeros(2, 3, 32, 32), [str(len(network) - 1)])
        assert work.macs == whole - last
        prefix.rerun({})
    assert work.macs == whole


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_counting_leaves_no_mark_in_a_traced_graph(peer):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2)).eval()
    bare = torch.jit.trace(network, torch.zeros(1, 3, 2, 2)).inlined_graph
    with peer.Work().counted():
        counted = torch.jit.trace(network, torch.zeros(1, 3, 2, 2)).inlined_graph
    assert [node.kind() for node in counted.nodes()] == [node.kind() for node in bare.nodes()]


def test_requests_and_results_survive_json(cases):
    steps = (cases.Step("spatial_svd", 0.75), cases.Step("channel_pruning", 0.66))
    case = cases.Case("a", "aimet", "resnet20", steps, {"reconstruction_samples": 500}, rival="b", seed=3)
    request = cases.Request(case, "0" * 64, 2, 1_000, "1.0")
    assert cases.Request.from_json(request.to_json()) == request
    effort = cases.Effort(1.5, 1.25, None, 7, 20.25, 0.5, "1.0")
    for result in (
        cases.Result("a", 0.5, 1_000, 0.6, 2_000, effort),
        cases.Result("a", None, None, 0.6, 2_000, None, "it broke"),
    ):
        assert cases.Result.from_json(result.to_json()) == result
    assert cases.asked_ratio(case) == pytest.approx(0.495)


# What is kept


def fake_result(cases, name, *, macs=500, accuracy=0.5, seconds=10.0, error=None):
    effort = cases.Effort(seconds, seconds, None, None, 10 * seconds, 1.0, "fake 1")
    if error is not None:
        return cases.Result(name, None, None, 0.6, 1_000, None, error)
    return cases.Result(name, accuracy, macs, 0.6, 1_000, effort)


@pytest.fixture
def laboratory(cases, running, tmp_path, monkeypatch):
    """One that runs no tool: its cases are answered from ``answers``, and noted in ``ran``."""
    weights = tmp_path / "weights"
    weights.write_text("weights")
    monkeypatch.setattr(running.Laboratory, "weights", lambda *_: weights)
    laboratory = running.Laboratory(tmp_path, 1)
    ran, answers = [], {}

    def run(self, request):
        ran.append(request)
        result = answers.get(request.case.name, fake_result(cases, request.case.name))
        home = self.home(request.case)
        home.mkdir(parents=True, exist_ok=True)
        (home / "request.json").write_text(request.to_json())
        (home / "result.json").write_text(result.to_json())
        return result

    monkeypatch.setattr(running.Laboratory, "run", run)
    return laboratory, ran, answers


def run(study, laboratory, only="*", *, again=False, table=False, long=False):
    return study.run(laboratory, only=only, again=again, table=table, long=long)


def test_finished_cases_are_not_run_again(study, laboratory):
    lab, ran, _ = laboratory
    first = run(study, lab, "aimet-svd*")
    assert [request.case.name for request in ran] == ["aimet-svd", "aimet-svd-monotonic"]
    assert run(study, lab, "aimet-*")["aimet-svd"] == first["aimet-svd"]
    assert len({request.case.name for request in ran}) == len(ran) == 5
    run(study, lab, "aimet-svd", again=True)
    assert [request.case.name for request in ran].count("aimet-svd") == 2
    assert set(run(study, lab, table=True)) == {case.name for case in study.AIMET_CASES}
    assert len(ran) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "aimet-pruning-50000"], "no case is called 'aimet-pruning-50000': aimet-svd, .* --long"),
        (["--long", "--only", "rival"], "no case is called 'rival': .*aimet-pruning-50000[^-]*$"),
    ],
)
def test_a_pattern_that_no_case_matches_is_refused(options, said, study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ratio_selection.py", *options, "--folder", str(tmp_path / "new")])
    with pytest.raises(SystemExit):
        study.main()
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_the_first_table_makes_its_folder(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ratio_selection.py", "--table", "--folder", str(tmp_path / "new")])
    study.main()
    assert (tmp_path / "new" / "resnet20.md").read_text() + "\n" == capsys.readouterr().out


def test_other_conditions_are_other_results(study, laboratory):
    lab, ran, _ = laboratory
    run(study, lab, "aimet-svd")
    assert run(study, dataclasses.replace(lab, threads=2), table=True) == {}
    lab.weights("resnet20").write_text("trained longer")
    assert run(study, lab, table=True) == {}
    assert len(ran) == 1


def test_result_does_not_outlive_the_source_that_made_it(study, laboratory, tmp_path, monkeypatch):
    lab, ran, _ = laboratory
    run(study, lab, "ours-svd")
    run(study, lab, "ours-svd")
    assert len(ran) == 1
    (tmp_path / "__init__.py").write_text("changed = True")
    monkeypatch.setattr(compress_search, "__file__", str(tmp_path / "__init__.py"))
    run(study, lab, "ours-svd")
    assert len(ran) == 2


def test_cases_with_a_rival_wait_for_it_and_get_its_macs(study, cases, laboratory, capsys):
    lab, ran, answers = laboratory
    assert run(study, lab, "ours-beside-aimet-svd") == {}
    assert "ours-beside-aimet-svd: aimet-svd has no result" in capsys.readouterr().out
    answers["aimet-svd"] = fake_result(cases, "aimet-svd", macs=431)
    answers["aimet-pruning-500"] = fake_result(cases, "aimet-pruning-500", error="it broke")
    run(study, lab)
    budgets = {request.case.name: request.budget for request in ran}
    assert budgets["ours-beside-aimet-svd"] == 431
    assert budgets["ours-beside-aimet-pruning-5000"] == 500
    assert budgets["ours-svd"] is None
    assert "ours-beside-aimet-pruning-500" not in budgets


def test_hours_are_spent_only_when_asked_for(study, laboratory):
    lab, ran, _ = laboratory
    run(study, lab)
    assert "aimet-pruning-50000" not in {request.case.name for request in ran}
    run(study, lab, long=True)
    assert ran[-4].case.name == "aimet-pruning-50000"
    assert {request.case.rival for request in ran[-3:]} == {"aimet-pruning-50000"}


def test_names_of_cases_are_unique_and_rivals_exist(study):
    names = [case.name for case in (*study.CASES, *study.LONG_CASES)]
    assert len(set(names)) == len(names)
    assert {case.rival for case in study.CASES} - {None} <= set(names)
    assert set(study.WANTED) <= set(names)


# Processes


@pytest.fixture
def real_laboratory(running, tmp_path, monkeypatch):
    """One with noise for data and an untrained network for weights."""
    cifar10 = importlib.import_module("image_data.images")
    torch.manual_seed(0)
    images = cifar10.Images(
        torch.randint(256, (100, 3, 32, 32), dtype=torch.uint8), torch.arange(100).to(torch.uint8) % 10
    )
    weights = tmp_path / "weights.safetensors"
    save_file(resnet20().state_dict(), weights)
    monkeypatch.setattr(running.Laboratory, "weights", lambda *_: weights)
    monkeypatch.setattr(running, "CALIBRATION_IMAGES", 32)
    monkeypatch.setattr(running, "EVALUATION_IMAGES", 20)
    laboratory = running.Laboratory(tmp_path, 1)
    monkeypatch.setitem(laboratory.__dict__, "data", (images, images))
    return laboratory


@pytest.mark.slow
def test_our_own_case_from_request_to_result(cases, real_laboratory):
    steps = (cases.Step("spatial_svd", 0.8), cases.Step("channel_pruning", 0.8))
    settings = {"selection": "uniform", "samples": 32}
    case = cases.Case("ours", cases.COMPRESS_SEARCH, "resnet20", steps, settings)
    request = real_laboratory.request(case, [])
    result = real_laboratory.run(request)
    assert result.error is None
    assert 0.62 < result.mac_ratio <= 0.64
    assert result.effort.seconds > 0
    assert result.effort.image_forwards > 32
    assert result.effort.version.startswith("compress-search ")
    assert real_laboratory.stored(case, []) == result
    beside = dataclasses.replace(case, name="beside", rival="ours", steps=steps[:1])
    assert real_laboratory.request(beside, [result]).budget == result.macs


def test_fault_of_a_tool_is_its_result(cases, running, real_laboratory, tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "torch_pruning_peer.py").write_text(
        "print('hello')\nraise ValueError('it broke')"
    )
    monkeypatch.setattr(running, "STUDIES", tmp_path)
    case = cases.Case("lost", cases.TORCH_PRUNING, "resnet20", (cases.Step("channel_pruning", 0.5),))
    result = real_laboratory.run(real_laboratory.request(case, []))
    assert result.error == "ValueError: it broke"
    assert result.accuracy is result.macs is result.effort is None
    assert real_laboratory.stored(case, []) == result


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_torch_pruning_meets_the_budget(cases, networks, layers, peer, importance):
    tool = importlib.import_module("benchmarks.torch_pruning_peer")
    network = friendly(networks, resnet20().state_dict())
    budget = layers.count_macs(network, SHAPE) * 9 // 10
    settings = {"importance": importance, "batchnorm": True}
    case = cases.Case("tp", cases.TORCH_PRUNING, "resnet20", (cases.Step("channel_pruning", 0.5),), settings)
    images = peer.Images(torch.randn(32, 3, 32, 32), torch.randn(20, 3, 32, 32), torch.arange(20) % 10)
    done = tool.compress(cases.Request(case, "", 1, budget, ""), network, images)
    macs = layers.count_macs(done.network, SHAPE)
    assert 0.97 * budget < macs <= budget
    assert not any(module.training for module in done.network.modules() if isinstance(module, nn.BatchNorm2d))


def test_batchnorm_is_reestimated_on_calibration_images(peer):
    tool = importlib.import_module("benchmarks.torch_pruning_peer")
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    images = peer.Images(3 + torch.randn(64, 3, 8, 8), torch.empty(0), torch.empty(0))
    with torch.no_grad():
        tool.reestimate_batchnorm(network, images)
        outputs = network(images.calibration)
    assert network[1].momentum == 0.1
    torch.testing.assert_close(outputs.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_environment_is_made_once_and_half_of_one_again(tmp_path, monkeypatch):
    environment = importlib.import_module("benchmarks.environment")
    calls = []

    def run(command, *, check):
        calls.append(command)
        if "torch==2.13.0" in command and len(calls) == 2:
            raise subprocess.CalledProcessError(1, command)
        Path(command[-1]).mkdir(parents=True) if "venv" in command else None

    monkeypatch.setattr(environment.subprocess, "run", run)
    with pytest.raises(subprocess.CalledProcessError):
        environment.python_of("aimet", tmp_path)
    assert environment.python_of("aimet", tmp_path) == tmp_path / "aimet" / "bin" / "python"
    assert len(calls) == 2 + 1 + len(environment.AIMET.installs)
    environment.python_of("aimet", tmp_path)
    assert len(calls) == 6
    assert environment.python_of("compress_search", tmp_path) == Path(sys.executable)
    assert len(calls) == 6


# The table


def test_table_says_what_each_case_came_to(study, cases):
    table = importlib.import_module("benchmarks.table")
    results = {
        "aimet-svd": fake_result(cases, "aimet-svd", accuracy=0.55, macs=431, seconds=120.0),
        "ours-beside-aimet-svd": fake_result(cases, "x", accuracy=0.595, macs=430, seconds=10.0),
        "aimet-pruning-500": fake_result(cases, "aimet-pruning-500", error="a | b"),
    }
    text = table.as_markdown(study.CASES, results, study.WANTED, "Head.")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(results)
    assert {row.count("|") for row in rows} == {len(table.COLUMNS) + 1}
    assert "| aimet | spatial svd 0.5 |  |  | 55.00% | 5.00 | 0.4310 | 0.5000 | 120.0 |" in text
    assert "failed: a / b" in text
    assert (
        "* ours-beside-aimet-svd beside aimet-svd: loses 0.10 of its 5.00 points (wanted: at most 0.2), "
        "12.0 times as fast (wanted: at least 10)" in text
    )
    header, *lines = table.as_csv(study.CASES, results).splitlines()
    assert len(lines) == len(results)
    assert "drop_points" in header and "image_forwards" in header


def test_table_of_nothing_is_empty(study):
    table = importlib.import_module("benchmarks.table")
    assert "|" not in table.as_markdown(study.CASES, {}, study.WANTED, "Head.")
    assert table.as_csv(study.CASES, {}) == ""
