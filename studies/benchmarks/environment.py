"""Where each tool runs, and in what version: virtual environments for peers that do not go with ours."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import compress_search
from benchmarks.cases import COMPRESS_SEARCH


@dataclass(frozen=True)
class Recipe:
    """What is installed, in order.

    Attributes:
        installs: For each call of ``pip install``, what comes after it.
    """

    installs: tuple[tuple[str, ...], ...]


AIMET = Recipe(
    (
        ("torch==2.13.0",),
        # They ask for another build of PyTorch than the one that is there.
        ("--no-deps", "torchvision==0.28.0", "aimet-torch==2.42.0"),
        (
            *("bokeh<=3.6.3,>=3.3.0", "cvxpy", "holoviews", "hvplot", "Jinja2", "jsonschema", "matplotlib"),
            *("networkx", "onnx", "onnxscript", "onnx_ir", "osqp", "pandas", "pillow", "psutil", "pybind11"),
            *("PyYAML", "safetensors", "scikit-learn", "scipy", "tensorboard", "tqdm"),
        ),
    )
)

ENVIRONMENTS: Mapping[str, Recipe] = {"aimet": AIMET}
"""The environment of each tool that does not run in ours."""


def version_of(tool: str) -> str:
    """What a tool's results depend on: its version, what is installed for it, or its very source."""
    if tool in ENVIRONMENTS:
        return " ".join(package for packages in ENVIRONMENTS[tool].installs for package in packages)
    if tool != COMPRESS_SEARCH:
        return metadata.version(tool)
    return source_hash(Path(compress_search.__file__).parent)


def source_hash(home: Path) -> str:
    """The hash of all Python files of a folder."""
    source = hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        source.update(f"{path.relative_to(home)}\n{path.read_text()}".encode())
    return source.hexdigest()[:16]


def python_of(tool: str, folder: Path) -> Path:
    """The interpreter that a tool runs in; its environment is made if it is not there.

    Args:
        tool: Name of the tool.
        folder: Where environments lie.

    Raises:
        subprocess.CalledProcessError: The environment cannot be made; pip has said why.
    """
    recipe = ENVIRONMENTS.get(tool)
    if recipe is None:
        return Path(sys.executable)
    home = folder.absolute() / tool
    python, made = home / "bin" / "python", home / "made.json"
    wanted = json.dumps(recipe.installs)
    # The note is written last: an environment without it is half of one.
    if not made.exists() or made.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        for packages in recipe.installs:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        made.write_text(wanted)
    return python
