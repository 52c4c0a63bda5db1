from __future__ import annotations

import pytest

from compress_search.plain_text import duration, format_table, without_numbers


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (245, "4 min 05 s"), (3_725, "1 h 02 min")],
)
def test_duration_never_shows_sixty_of_anything(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_table_has_columns_as_wide_as_their_longest_cell() -> None:
    rows = [["layer", "MACs", "note"], ["conv1", "1,234", ""], ["a.longer.name", "5", "left alone"]]
    assert format_table(rows, right=["MACs"]).splitlines() == [
        "layer           MACs  note",
        "--------------------------",
        "conv1          1,234",
        "a.longer.name      5  left alone",
    ]


def test_titles_alone_make_a_table() -> None:
    assert format_table([["trial", "state"]]) == "trial  state\n------------"


def test_messages_that_differ_in_numbers_alone_are_the_same_without_them() -> None:
    assert (
        without_numbers("no file 12 in 0.5 s") == without_numbers("no file 3 in 17 s") == "no file # in # s"
    )
    assert without_numbers("no file") != without_numbers("no folder")
