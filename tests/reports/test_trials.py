from __future__ import annotations

import csv
import io
from collections.abc import Callable

import pytest

from compress_search.reports.trials import candidates_csv, stage_times
from compress_search.results import Candidate, ParetoFront

Make = Callable[..., Candidate]
MakeFront = Callable[..., ParetoFront]


def test_stage_times_tell_the_two_fine_tunings_apart_and_count_what_reuse_saved(make_candidate: Make) -> None:
    candidates = [
        make_candidate(0, 0.5, 0.97),
        make_candidate(1, 0.5, 0.97, reused=2),
        make_candidate(2, 0.5, 0.9, state="pruned", reused=1),
    ]
    rows = {row.name: row for row in stage_times(candidate.stages for candidate in candidates)}
    assert list(rows) == [
        "spatial_svd",
        "fine_tune after spatial_svd",
        "channel_pruning",
        "fine_tune after channel_pruning",
    ]
    svd, last = rows["spatial_svd"], rows["fine_tune after channel_pruning"]
    assert (svd.computed, svd.seconds, svd.reused, svd.saved) == (1, 10.0, 2, 20.0)
    assert (last.computed, last.seconds, last.reused, last.saved) == (2, 26.0, 0, 0.0)


def test_the_csv_has_every_trial_in_full_precision(make_candidate: Make, make_front: MakeFront) -> None:
    reason = 'it said "no",\nthen broke'
    front = make_front(
        make_candidate(0, 0.4999999999, 0.97 + 1 / 3000, reused=1),
        make_candidate(1, 0.5, 0.9, state="failed", reason=reason),
        make_candidate(2, 0.7, 0.98, params={"c_ssvd": 0.7}),
    )
    rows = list(csv.DictReader(io.StringIO(candidates_csv(front))))
    assert [row["number"] for row in rows] == ["0", "1", "2"]
    first, failed, other = rows
    assert float(first["accuracy"]) == front.candidates[0].accuracy
    assert float(first["mac_ratio"]) == 0.4999999999
    assert (first["on_front"], first["feasible"], other["feasible"]) == ("True", "True", "False")
    assert [first[f"stage_{n}_reused"] for n in (1, 2, 3, 4)] == ["True", "False", "False", "False"]
    assert (failed["reason"], failed["accuracy"], failed["macs"]) == (reason, "", "")
    assert (failed["stage_1_name"], failed["stage_2_name"]) == ("spatial_svd", "")
    assert (other["param_c_ssvd"], other["param_c_cp"]) == ("0.7", "")
    assert int(other["macs"]) == 700_000
    assert float(first["param_c_cp"]) == pytest.approx(0.4999999999 / 0.75, rel=1e-15)


def test_an_empty_study_has_a_header_alone(make_front: MakeFront) -> None:
    assert candidates_csv(make_front()).count("\n") == 1
