"""Giving memory that was freed back to the system."""

from __future__ import annotations

import ctypes

_WORTH_IT = 2**28
"""So many free bytes are given back. With fewer, to be given them anew takes longer than it is worth: with
ResNet-20 on images of 32 pixels a tenth of the time that pruning takes."""


class _HeldByGlibc(ctypes.Structure):
    """What its ``mallinfo2`` tells: ten sizes, of which the ninth is that of all free blocks."""

    _fields_ = [(f"size_{number}", ctypes.c_size_t) for number in range(1, 11)]


def give_back_free_memory() -> None:
    """Give back what the allocator holds but nobody uses; called where a phase with other sizes begins.

    glibc keeps blocks of up to 32 MiB that are freed, and finds no use for the holes between those that are
    not: with VGG-16's maps of 12 MiB they came to half a gigabyte. Elsewhere, and on GPUs, this does nothing.
    """
    try:
        glibc = ctypes.CDLL(None)
        look, trim = glibc.mallinfo2, glibc.malloc_trim
    except (AttributeError, OSError, TypeError):
        # Another allocator, or one before glibc 2.33; Windows has no library of no name.
        return
    look.restype = _HeldByGlibc
    if look().size_9 > _WORTH_IT:
        trim(0)
