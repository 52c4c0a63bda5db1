"""What it takes to have a candidate again: the code that loads it, and the versions that made it."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

PLAN_FILE, WEIGHTS_FILE, PROGRAM_FILE, ONNX_FILE = "plan.json", "model.safetensors", "model.pt2", "model.onnx"

_PACKAGES = (
    "compress-search",
    "torch",
    "torch-pruning",
    "optuna",
    "numpy",
    "safetensors",
    "plotly",
    "onnx",
    "onnxruntime",
)


def loading_code(plan: Path | str, weights: Path | str) -> str:
    """The Python that rebuilds a compressed model from its plan and weights.

    Args:
        plan: Where the plan lies, as the code shall say it.
        weights: Where the safetensors file lies, likewise.

    Returns:
        Two imports and three lines; ``original`` is the model that was compressed.
    """
    return (
        "from safetensors.torch import load_file\n"
        "from compress_search import CompressionPlan, apply_plan\n\n"
        f"model = apply_plan(original, CompressionPlan.load({_quoted(plan)}))\n"
        f"model.load_state_dict(load_file({_quoted(weights)}))\n"
        "model.eval()"
    )


def program_loading_code(program: Path | str) -> str:
    """The Python that loads a ``torch.export`` program, for which PyTorch alone is enough.

    Args:
        program: Where the ``.pt2`` file lies, as the code shall say it.
    """
    return f"import torch\n\nmodel = torch.export.load({_quoted(program)}).module()"


def package_versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that matter to a result; absent ones are left out."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _quoted(path: Path | str) -> str:
    return json.dumps(str(path), ensure_ascii=False)
