from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from compress_search.reports.trials import stage_order, stage_times
from compress_search.results import Candidate

Make = Callable[..., Candidate]


def test_stage_times_tell_the_two_fine_tunings_apart_and_count_what_reuse_saved(make_candidate: Make) -> None:
    candidates = [
        make_candidate(0, 0.5, 0.97),
        make_candidate(1, 0.5, 0.97, reused=2),
        make_candidate(2, 0.5, 0.9, state="pruned", reused=1),
    ]
    # What a reused one had saved was saved once.
    known = [replace(stage, teacher_seconds_saved=4.0) for stage in candidates[1].stages]
    candidates[1] = replace(candidates[1], stages=tuple(known))
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
    assert (svd.teacher_saved, last.teacher_saved) == (0.0, 4.0)


@pytest.mark.parametrize(
    "sequences",
    [
        [("a", "b", "c", "d"), ("c", "d"), ("a", "b")],
        [("c", "d"), ("a", "b", "c", "d"), ()],
        [("a", "b", "c", "d"), ("a", "c", "d"), ("d",)],
    ],
)
def test_stages_have_one_order_whatever_trials_leave_out(sequences: list[tuple[str, ...]]) -> None:
    assert stage_order(sequences) == ("a", "b", "c", "d")


def test_a_longer_training_comes_last() -> None:
    assert stage_order([("a", "b"), ("a", "b", "c")]) == ("a", "b", "c")
