"""Tensors in a file that is known to be what was written: a checksum in front, nothing pickled.

Such a file is the SHA-256 of all that follows as 64 hexadecimal digits, a line feed, and a safetensors
document: tensors by name, and everything else as JSON in its metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_DIGITS = 64
_DOCUMENT = "training"
"""Name of the safetensors metadata that holds the JSON."""


def sealed(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> bytes:
    """Make the content of a file.

    Args:
        tensors: By name; contiguous, on the CPU, and no two of them in the same memory.
        values: Everything else, JSON-able.
    """
    document = save(dict(tensors), metadata={_DOCUMENT: json.dumps(dict(values))})
    return hashlib.sha256(document).hexdigest().encode() + b"\n" + document


def unsealed(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what :func:`sealed` was given.

    Raises:
        ValueError: The content is not what was written.
    """
    checksum, document = content[:_DIGITS], content[_DIGITS + 1 :]
    if hashlib.sha256(document).hexdigest().encode() != checksum:
        raise ValueError("it does not have the checksum it was written with")
    # The first eight bytes are the length of the JSON header that follows.
    length = int.from_bytes(document[:8], "little")
    try:
        header = json.loads(document[8 : 8 + length])
        return load(document), json.loads(header["__metadata__"][_DOCUMENT])
    except (KeyError, SafetensorError) as error:
        raise ValueError(f"it is of another kind: {type(error).__name__}: {error}") from error
