"""What is written of exporters' errors; the programs themselves are tested with exports and latencies."""

from __future__ import annotations

import pytest

from compress_search.programs import brief


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no.\nand more"), "ValueError: no"),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError("\x1b[96mStep 1/2\x1b[0m failed:\n"), "RuntimeError: Step 1/2 failed:"),
    ],
)
def test_errors_are_one_plain_line(error, line):
    assert brief(error) == line
