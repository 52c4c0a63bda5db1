from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress_search.exceptions import ModelError, PlanError, StudyError, WorkspaceError
from compress_search.export import export_candidate
from compress_search.plan import CompressionPlan, FactoriseLayer, KeepChannels, Part, PlanStep, apply_plan
from compress_search.results import Candidate, StageResult

EXAMPLE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        return self.head(x.mean((2, 3)))


class NetOfOneBatchSize(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(2, 3, 8, 8))


class NetThatLooksAtItsData(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > 0.5 else -x)


class NetThatExportsWrong(Net):
    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return outputs * 2 if torch.compiler.is_exporting() else outputs


class NetThatDoesNotRun(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("needs a device that this machine lacks")


def _plan() -> CompressionPlan:
    vertical = {"in_channels": 3, "out_channels": 4, "kernel_size": (3, 1), "padding": (1, 0), "bias": False}
    horizontal = {"in_channels": 4, "out_channels": 8, "kernel_size": (1, 3), "padding": (0, 1)}
    parts = (Part("vertical", "Conv2d", vertical), Part("horizontal", "Conv2d", horizontal))
    kept = (0, 2, 3, 5, 7)
    prune = (
        KeepChannels("conv1.horizontal", outputs=kept),
        KeepChannels("norm", outputs=kept),
        KeepChannels("head", inputs=kept),
    )
    return CompressionPlan(
        (
            PlanStep("spatial_svd", 0.6, (FactoriseLayer("conv1", 4, parts),)),
            PlanStep("channel_pruning", 0.7, prune),
        )
    )


@pytest.fixture
def make_candidate(tmp_path: Path) -> Callable[..., Candidate]:
    def make(net: type[nn.Module] = Net) -> Candidate:
        folder = tmp_path / "stages" / "0123"
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        model = apply_plan(net(), _plan())
        _plan().save(folder / "plan.json")
        save_file(model.state_dict(), folder / "weights.safetensors")
        stage = StageResult("0123", "fine_tune", 0.97, 5000, 300, 0.5, 12.0)
        return Candidate(
            number=7,
            state="complete",
            params={"c_ssvd": 0.75, "c_cp": 0.66},
            stages=(stage,),
            accuracy=0.97,
            mac_ratio=0.5,
            drop=0.01,
            feasible=True,
            seconds=12.0,
            folder=folder,
            build_model=lambda: net().eval(),
        )

    return make


def _outputs(candidate: Candidate, inputs: Tensor = EXAMPLE) -> Tensor:
    with torch.no_grad():
        return candidate.load_model()(inputs)


def _leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_every_form_loads_and_gives_the_same_outputs(
    make_candidate: Callable[..., Candidate], tmp_path: Path
) -> None:
    candidate = make_candidate()
    files = export_candidate(candidate, tmp_path / "export" / "trial-7", example_input=EXAMPLE, onnx=True)
    assert files.program
    assert files.onnx
    assert {p.name for p in files.folder.iterdir()} == {
        "plan.json",
        "model.safetensors",
        "model.pt2",
        "model.onnx",
        "candidate.json",
    }
    model = apply_plan(Net(), CompressionPlan.load(files.plan)).eval()
    model.load_state_dict(load_file(files.weights))
    program = torch.export.load(files.program).module()
    session = onnxruntime.InferenceSession(files.onnx)
    # Batches of any size, one included, though the example has two.
    for batch in (EXAMPLE, EXAMPLE[:1], EXAMPLE.repeat(3, 1, 1, 1)):
        wanted = _outputs(candidate, batch)
        with torch.no_grad():
            assert torch.equal(model(batch), wanted)
            assert torch.allclose(program(batch), wanted, atol=1e-5)
        onnx_outputs = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        assert torch.allclose(torch.from_numpy(onnx_outputs[0]), wanted, atol=1e-5)


def test_the_summary_has_the_numbers_the_checksums_and_code_that_works(
    make_candidate: Callable[..., Candidate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = make_candidate()
    files = export_candidate(candidate, tmp_path / "export", example_input=EXAMPLE)
    summary = json.loads(files.summary.read_text())
    assert (summary["trial"], summary["accuracy"], summary["mac_ratio"]) == (7, 0.97, 0.5)
    assert (summary["macs"], summary["params"]) == (5000, 300)
    assert summary["search_params"] == {"c_ssvd": 0.75, "c_cp": 0.66}
    assert summary["stages"] == [candidate.stages[0].to_dict()]
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(summary["sha256"]) == {"plan.json", "model.safetensors", "model.pt2"}
    for name, digest in summary["sha256"].items():
        assert hashlib.sha256((files.folder / name).read_bytes()).hexdigest() == digest
    monkeypatch.chdir(files.folder)
    for code in summary["load"].values():
        names = {"original": Net()}
        exec("\n".join(code), names)
        with torch.no_grad():
            assert torch.allclose(names["model"](EXAMPLE), _outputs(candidate), atol=1e-6)


def test_a_model_of_one_batch_size_is_exported_for_that(
    make_candidate: Callable[..., Candidate], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    candidate = make_candidate(NetOfOneBatchSize)
    with caplog.at_level(logging.INFO, "compress_search"):
        files = export_candidate(candidate, tmp_path / "export", example_input=EXAMPLE, onnx=True)
    assert files.program
    assert files.onnx
    assert "batches of 2 only" in caplog.text
    with torch.no_grad():
        outputs = torch.export.load(files.program).module()(EXAMPLE)
    assert torch.allclose(outputs, _outputs(candidate), atol=1e-6)


@pytest.mark.parametrize("net", [NetThatLooksAtItsData, NetThatExportsWrong])
def test_a_form_that_cannot_be_made_or_is_wrong_does_not_lose_the_rest(
    net: type[nn.Module],
    make_candidate: Callable[..., Candidate],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = export_candidate(make_candidate(net), tmp_path / "export", example_input=EXAMPLE, onnx=True)
    assert (files.program, files.onnx) == (None, None)
    assert {p.name for p in files.folder.iterdir()} == {"plan.json", "model.safetensors", "candidate.json"}
    assert set(json.loads(files.summary.read_text())["load"]) == {"plan and weights"}
    assert "Trial 7 is exported without model.pt2" in caplog.text
    assert "without model.onnx" in caplog.text


def test_what_is_not_known_or_does_not_run_leaves_plan_and_weights(
    make_candidate: Callable[..., Candidate], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    candidate = make_candidate(NetThatDoesNotRun)
    without_task = dataclasses.replace(candidate, build_model=None)
    cases = {
        "the original model is not known": (without_task, EXAMPLE),
        "an example input is not known": (candidate, None),
        "needs a device that this machine lacks": (candidate, EXAMPLE),
    }
    for reason, (this, example) in cases.items():
        caplog.clear()
        files = export_candidate(this, tmp_path / "export", example_input=example)
        assert reason in caplog.text
        assert files.program is None
        assert files.weights.read_bytes() == candidate.weights.read_bytes()


def test_exporting_again_replaces_the_folder(
    make_candidate: Callable[..., Candidate], tmp_path: Path
) -> None:
    candidate = make_candidate()
    folder = tmp_path / "export"
    assert export_candidate(candidate, folder, example_input=EXAMPLE).program
    # A leftover of the first export would be found by anything that looks at the folder.
    assert export_candidate(candidate, folder, example_input=None).program is None
    assert {p.name for p in folder.iterdir()} == {"plan.json", "model.safetensors", "candidate.json"}
    assert _leftovers(tmp_path) == []


def test_a_folder_with_other_files_is_left_alone(
    make_candidate: Callable[..., Candidate], tmp_path: Path
) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("years of work")
    with pytest.raises(WorkspaceError, match=r"chapter\.tex.*choose a new one"):
        export_candidate(make_candidate(), folder, example_input=None)
    assert (folder / "chapter.tex").read_text() == "years of work"


def test_an_export_that_fails_leaves_the_earlier_one(
    make_candidate: Callable[..., Candidate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = make_candidate()
    folder = tmp_path / "export"
    before = export_candidate(candidate, folder, example_input=None).summary.read_bytes()
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if target == folder and (Path(source) / "candidate.json").read_bytes() != before:
            raise OSError("no space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(WorkspaceError, match="no space left on device"):
        export_candidate(dataclasses.replace(candidate, number=8), folder, example_input=None)
    assert (folder / "candidate.json").read_bytes() == before
    assert _leftovers(tmp_path) == []


def test_a_candidate_that_did_not_complete_has_no_model(
    make_candidate: Callable[..., Candidate], tmp_path: Path
) -> None:
    pruned = dataclasses.replace(make_candidate(), state="pruned", folder=None)
    with pytest.raises(StudyError, match="Trial 7 is pruned"):
        export_candidate(pruned, tmp_path / "export", example_input=EXAMPLE)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("fault", ["gone", "cut off", "of another model"])
def test_damaged_weights_are_named_with_the_remedy(
    fault: str, make_candidate: Callable[..., Candidate], tmp_path: Path
) -> None:
    candidate = make_candidate()
    if fault == "gone":
        candidate.weights.unlink()
    elif fault == "cut off":
        candidate.weights.write_bytes(candidate.weights.read_bytes()[:-100])
    else:
        save_file(Net().state_dict(), candidate.weights)
    with pytest.raises(
        (StudyError, ModelError), match=r"(?i)the weights .* Run the same study under another"
    ):
        export_candidate(candidate, tmp_path / "export", example_input=EXAMPLE)
    assert not (tmp_path / "export").exists()
    assert _leftovers(tmp_path) == []


def test_a_plan_that_is_gone_is_named(make_candidate: Callable[..., Candidate], tmp_path: Path) -> None:
    candidate = make_candidate()
    assert candidate.folder
    (candidate.folder / "plan.json").unlink()
    with pytest.raises(PlanError, match=r"plan\.json"):
        export_candidate(candidate, tmp_path / "export", example_input=EXAMPLE)


def test_others_may_read_what_is_shipped(make_candidate: Callable[..., Candidate], tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        files = export_candidate(make_candidate(), tmp_path / "export", example_input=None)
    finally:
        os.umask(old)
    assert files.folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in files.folder.iterdir()} == {0o644}
