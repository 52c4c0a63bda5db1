from __future__ import annotations

import pytest

from compress_search.accuracy_scale import AccuracyScale
from compress_search.reports.formatting import (
    byte_size,
    count,
    ratio,
    short_count,
    technique,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (12_345, "12.3 k"),
        (123_456, "123 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (1_234_567, "1.23 M"),
        (4_089_000_000, "4.09 G"),
        (15_500_000_000_000, "15.5 T"),
    ],
)
def test_short_count_has_three_digits_and_the_right_prefix(value: int, text: str) -> None:
    assert short_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (2 * 10**9, "2.00 GB"),
    ],
)
def test_bytes_have_three_digits_and_the_right_prefix(value: int, text: str) -> None:
    assert byte_size(value) == text


def test_shares_are_shown_in_per_cent_and_other_scores_as_they_are() -> None:
    share, score = AccuracyScale.of([0.0, 0.5, 1.0]), AccuracyScale.of([0.5, -3.25])
    assert (share.accuracy(0.98312), share.drop(0.0028), share.drop(-0.01)) == (
        "98.31 %",
        "+0.28 points",
        "-1.00 points",
    )
    assert (score.accuracy(-3.25), score.drop(1.5)) == ("-3.25", "+1.50")
    assert "%" in share.axis_title
    assert "%" not in score.axis_title


def test_what_is_missing_is_empty() -> None:
    scale = AccuracyScale.of([0.5])
    assert [ratio(None), count(None), scale.accuracy(None), scale.drop(None)] == [""] * 4


def test_technique_is_for_people() -> None:
    assert [technique("spatial_svd"), technique("channel_pruning")] == ["spatial SVD", "channel pruning"]
