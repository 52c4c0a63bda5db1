"""How numbers are written in reports, so that a figure and a table say the same thing in the same way."""

from __future__ import annotations

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_THREE_DIGITS_OF_ONE = 0.9995


def ratio(value: float | None) -> str:
    """Write a MAC ratio with four decimals."""
    return "" if value is None else f"{value:.4f}"


def count(value: int | None) -> str:
    """Write a whole number with its thousands apart, for example ``"1,234,567"``."""
    return "" if value is None else f"{value:,}"


def short_count(value: int) -> str:
    """Write a count with three digits and a prefix, for example ``"1.23 M"``."""
    for size, prefix in _PREFIXES:
        # 999,500 is a million when it is rounded to three digits.
        if value >= _THREE_DIGITS_OF_ONE * size:
            return f"{_three_digits(value / size)} {prefix}"
    return str(value)


def byte_size(value: int) -> str:
    """Write a number of bytes with a prefix of thousands, for example ``"1.23 MB"``."""
    return f"{value} B" if value < _THREE_DIGITS_OF_ONE * _PREFIXES[-1][0] else f"{short_count(value)}B"


def duration(seconds: float) -> str:
    """Write a time in seconds, minutes or hours, for example ``"4 min 05 s"``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def technique(method: str) -> str:
    """Write a method's name for people, for example ``"spatial SVD"``."""
    return method.replace("_", " ").replace("svd", "SVD")


def stage_label(name: str) -> str:
    """Write a stage's name for people, for example ``"fine-tuning after spatial SVD"``."""
    return technique(name.replace("fine_tune", "fine-tuning"))


def _three_digits(value: float) -> str:
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
