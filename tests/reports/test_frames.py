from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from compress_search.reports.frames import (
    layers_frame,
    sensitivity_frame,
    times_frame,
    trials_frame,
    write_frames,
)
from compress_search.reports.layers import LayerRow
from compress_search.reports.sensitivity import StageSensitivity
from compress_search.reports.trials import StageTime
from compress_search.results import Candidate, ParetoFront
from compress_search.selection.table import Cell, SensitivityTable

Make = Callable[..., Candidate]
MakeFront = Callable[..., ParetoFront]

REASON = 'it said "no",\nthen broke'


@pytest.fixture
def front(make_candidate: Make, make_front: MakeFront) -> ParetoFront:
    return make_front(
        make_candidate(0, 0.4999999999, 0.97 + 1 / 3000, reused=1),
        make_candidate(1, 0.5, 0.9, state="failed", reason=REASON),
        make_candidate(2, 0.7, 0.98, params={"c_ssvd": 0.7}),
    )


def test_the_csv_has_every_trial_in_full_precision(front: ParetoFront, tmp_path: Path) -> None:
    file = write_frames(tmp_path, {"trials": trials_frame(front)})[0]
    with file.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["number"] for row in rows] == ["0", "1", "2"]
    first, failed, other = rows
    assert float(first["accuracy"]) == front.candidates[0].accuracy
    assert float(first["mac_ratio"]) == 0.4999999999
    assert (first["on_front"], first["feasible"], other["feasible"]) == ("True", "True", "False")
    assert [first[f"stage_{n}_reused"] for n in (1, 2, 3, 4)] == ["True", "False", "False", "False"]
    assert (failed["reason"], failed["accuracy"], failed["macs"]) == (REASON, "", "")
    assert (failed["stage_1_name"], failed["stage_2_name"]) == ("spatial_svd", "")
    assert (other["param_c_ssvd"], other["param_c_cp"]) == ("0.7", "")
    assert int(other["macs"]) == 700_000
    assert float(first["param_c_cp"]) == pytest.approx(0.4999999999 / 0.75, rel=1e-15)


def test_columns_are_typed_whatever_is_in_them(front: ParetoFront, make_front: MakeFront) -> None:
    full, empty = trials_frame(front), trials_frame(make_front())
    assert len(empty) == 0
    assert dict(empty.dtypes).items() <= dict(full.dtypes).items()
    assert full.dtypes["macs"] == "Int64"
    assert full.dtypes["accuracy"] == full.dtypes["param_c_ssvd"] == "float64"
    assert full.dtypes["reason"] == "string"
    assert full.dtypes["stage_1_reused"] == "boolean"
    assert list(full["reason"].isna()) == [True, False, True]


def test_search_variables_have_the_types_of_their_values(make_candidate: Make, make_front: MakeFront) -> None:
    values = [
        {"epochs": 2, "lr": 0.1, "wide": True, "selection": "optimal", "mixed": 1},
        {"epochs": 3, "lr": 1, "wide": False, "selection": "uniform", "mixed": "one"},
        {},
    ]
    frame = trials_frame(make_front(*(make_candidate(n, 0.5, 0.9, params=p) for n, p in enumerate(values))))
    kinds = {name: str(frame.dtypes[f"param_{name}"]) for name in values[0]}
    assert kinds == {
        "epochs": "Int64",
        "lr": "float64",
        "wide": "boolean",
        "selection": "string",
        "mixed": "string",
    }
    assert list(frame["param_mixed"][:2]) == ["1", "one"]


def test_layers_have_a_row_each() -> None:
    rows = [LayerRow("a", "Conv2d", "rank 3", 300, 100, ""), LayerRow("b", "Linear", "", 0, 0, "it is idle")]
    frame = layers_frame(rows)
    assert list(frame["mac_ratio"]) == [100 / 300, 1.0]
    assert frame["macs_after"].sum() == 100
    assert list(frame["left_alone"]) == ["", "it is idle"]
    assert layers_frame([]).dtypes.equals(frame.dtypes)


def test_cells_say_of_which_stage_they_are() -> None:
    first = StageSensitivity("spatial_svd", "nats", SensitivityTable((Cell("a", 1, 0.5), Cell("a", 2, 0.25))))
    second = StageSensitivity(
        "channel_pruning", "nats", SensitivityTable((Cell("a", 7, 0.1, measured=False),))
    )
    frame = sensitivity_frame([first, second])
    assert list(frame["stage"]) == [1, 1, 2]
    assert frame.iloc[2].to_dict() == {
        "stage": 2,
        "method": "channel_pruning",
        "unit": "a",
        "size": 7,
        "loss": 0.1,
        "measured": False,
    }
    assert sensitivity_frame([]).dtypes.equals(frame.dtypes)


def test_times_are_those_of_the_stages() -> None:
    frame = times_frame(
        [StageTime("spatial_svd", computed=2, seconds=3.5, reused=1, saved=1.5, teacher_saved=0.5)]
    )
    assert frame.to_dict("records") == [
        {
            "stage": "spatial_svd",
            "computed": 2,
            "seconds": 3.5,
            "reused": 1,
            "saved": 1.5,
            "teacher_saved": 0.5,
        }
    ]


def test_parquet_keeps_values_and_types(front: ParetoFront, make_front: MakeFront, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    frames = {"trials": trials_frame(front), "empty": trials_frame(make_front())}
    files = write_frames(tmp_path, frames)
    assert [file.name for file in files] == ["trials.csv", "empty.csv", "trials.parquet", "empty.parquet"]
    for file, frame in zip(files[2:], frames.values(), strict=True):
        pd.testing.assert_frame_equal(pd.read_parquet(file), frame)


def test_without_pyarrow_there_is_csv_alone(
    front: ParetoFront, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [file.name for file in write_frames(tmp_path, {"trials": trials_frame(front)})] == ["trials.csv"]
