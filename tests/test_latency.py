"""Latency: what is summed up, what is compared, what is left out, and what it reads and writes."""

from __future__ import annotations

import builtins
import csv
import io
import json
import time

import pytest
import torch
from torch import nn

from compress_search import latency
from compress_search.exceptions import ConfigError, DeviceError, ModelError
from compress_search.latency import (
    COMPILED,
    COMPRESSED,
    EAGER,
    ONNX_RUNTIME,
    ORIGINAL,
    LatencyRow,
    LatencyTable,
    Spread,
    load_program,
    measure_latency,
)
from compress_search.programs import write_program


class Waiting(nn.Module):
    """A model that takes a known time, and notes the batches that it sees."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.seen = seconds, []

    def forward(self, inputs):
        self.seen.append(len(inputs))
        time.sleep(self.seconds)
        return inputs


def table_of(*speeds, mac_ratio=0.5):
    """A table with one row for each pair of medians, original and compressed."""
    rows = [
        LatencyRow(EAGER, number, {ORIGINAL: Spread(a, a, a, 20), COMPRESSED: Spread(b, b, b, 20)})
        for number, (a, b) in enumerate(speeds, 1)
    ]
    return LatencyTable("a processor", 1, "2.15", mac_ratio, tuple(rows))


def test_a_spread_is_the_quartiles():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_what_takes_twice_as_long_is_found_to(tiny_net):
    models = {ORIGINAL: Waiting(0.004), COMPRESSED: Waiting(0.002)}
    table = measure_latency(models, torch.zeros(5, 3), batches=[1, 4], runtimes=[EAGER], seconds=0)
    assert [row.batch for row in table.rows] == [1, 4]
    for row in table.rows:
        assert row.times[ORIGINAL].median >= 0.004
        assert row.times[ORIGINAL].runs == 20
        assert row.speed_up == pytest.approx(2, rel=0.25)
    # Five runs of each size for warm-up come first.
    assert models[ORIGINAL].seen == [1] * 25 + [4] * 25


def test_gradients_are_not_kept_and_threads_are_put_back(tiny_net):
    kept = []

    class Noting(nn.Linear):
        def forward(self, inputs):
            outputs = super().forward(inputs)
            kept.append((outputs.requires_grad, torch.get_num_threads()))
            return outputs

    before = torch.get_num_threads()
    model = {COMPRESSED: Noting(3, 2).eval()}
    table = measure_latency(model, torch.zeros(1, 3), runtimes=[EAGER], threads=before + 1, seconds=0)
    assert set(kept) == {(False, before + 1)}
    assert table.threads == before + 1
    assert torch.get_num_threads() == before


def test_onnx_runtime_runs_the_model_at_every_batch_size(tiny_net):
    pytest.importorskip("onnxruntime")
    table = measure_latency(
        {COMPRESSED: tiny_net().eval()}, torch.zeros(1, 1, 6, 6), runtimes=[ONNX_RUNTIME], seconds=0
    )
    assert [row.reason for row in table.rows] == [None, None]
    assert [row.batch for row in table.rows] == [1, 32]
    assert all(row.times[COMPRESSED].median > 0 for row in table.rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_are_measured(tiny_net):
    models = {ORIGINAL: tiny_net().eval(), COMPRESSED: tiny_net(width=2).eval()}
    (row,) = measure_latency(
        models, torch.zeros(1, 1, 6, 6), batches=[2], runtimes=[COMPILED], seconds=0
    ).rows
    assert row.reason is None
    assert row.speed_up > 0


def test_a_runtime_that_is_missing_is_left_out_with_its_reason(tiny_net, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **others):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest, **others)

    def no_compiler(*_):
        raise RuntimeError("no working C++ compiler was found\nand a page of more")

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(latency, "RUNTIMES", {**latency.RUNTIMES, COMPILED: no_compiler})
    table = measure_latency({COMPRESSED: tiny_net().eval()}, torch.zeros(1, 1, 6, 6), batches=[1], seconds=0)
    eager, compiled, onnx = table.rows
    assert eager.reason is None
    assert compiled.reason == "RuntimeError: no working C++ compiler was found"
    assert "not installed: pip install 'compress-search[onnx]'" in onnx.reason
    assert "left out: RuntimeError: no working C++ compiler was found" in table.to_markdown()
    assert table.to_csv().count("no working C++ compiler") == 1


def test_fewer_macs_that_are_hardly_faster_are_remarked():
    table = table_of((0.010, 0.008), (0.010, 0.005))
    assert table.remarks == ["eager, batch 1: 2.00 times fewer MACs are only 1.25 times faster."]
    assert table.remarks[0] in table.to_markdown()
    assert table_of((0.010, 0.010), mac_ratio=None).remarks == []


def test_a_table_is_written_as_markdown_and_csv_and_read_from_json():
    table = table_of((0.0123, 0.004))
    assert "| eager | 1 | 12.30 (12.30-12.30) | 4.00 (4.00-4.00) | 3.08 |" in table.to_markdown()
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [(row["model"], float(row["median_s"])) for row in rows] == [
        (ORIGINAL, 0.0123),
        (COMPRESSED, 0.004),
    ]
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_all_that_is_wrong_is_told_at_once(tiny_net):
    with pytest.raises(ConfigError) as caught:
        measure_latency({}, torch.zeros(1, 3), batches=[0, 1], runtimes=["tvm"], threads=0, seconds=-1)
    batch, runtime, threads, seconds = caught.value.faults
    assert batch == "batch is 0; it must be 1 or more."
    assert runtime == "There is no runtime 'tvm'; there are eager, torch.compile, onnxruntime."
    assert threads.startswith("threads is 0")
    assert seconds.startswith("seconds is -1")


@pytest.mark.parametrize("device", ["cuda:99", torch.device("cuda:99")])
def test_a_gpu_that_is_not_there_is_refused(tiny_net, device):
    with pytest.raises(DeviceError, match="device is 'cuda:99', but PyTorch sees"):
        measure_latency({ORIGINAL: tiny_net().eval()}, torch.zeros(1, 1, 6, 6), device=device)


def test_a_program_is_read_from_its_file_or_its_folder(tiny_net, tmp_path):
    model = tiny_net().eval()
    write_program(tmp_path / "model.pt2", model, torch.randn(1, 1, 6, 6))
    for path in (tmp_path, tmp_path / "model.pt2"):
        loaded, example = load_program(path)
        torch.testing.assert_close(loaded(example), model(example))


def test_a_file_that_is_no_program_is_refused(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"something else")
    with pytest.raises(ModelError, match=r"no torch\.export program.*compress-search export"):
        load_program(tmp_path / "model.pt2")
    with pytest.raises(ModelError, match=r"There is no file .*none\.pt2"):
        load_program(tmp_path / "none.pt2")
