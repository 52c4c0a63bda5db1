"""The house: imports point up one list, and every module says what it is for."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import compress_search

ORDER = (
    "exceptions",
    "device",
    "html_table",
    "plain_text",
    "workspace",
    "disk_space",
    "repeating",
    "worker_process",
    "leases",
    "checkpoint",
    "fingerprint",
    "function_identity",
    "stage_files",
    "profile",
    "surgery",
    "weight_sharing",
    "plan",
    "loaders",
    "task",
    "recipe",
    "accuracy_scale",
    "target",
    "results",
    "progress",
    "free_memory",
    "linear_algebra",
    "divergence",
    "memory_layout",
    "replay",
    "patches",
    "moments",
    "sampled_rows",
    "activations",
    "calibration",
    "pausing",
    "following",
    "joint_refit",
    "least_squares",
    "reconstruction",
    "methods",
    "selection",
    "compression",
    "stopping",
    "training",
    "stage_store",
    "layer_by_layer",
    "stages",
    "stage_inventory",
    "task_path",
    "yaml_settings",
    "programs",
    "latency",
    "reports",
    "export",
    "search",
    "config",
    "__init__",
    "cli",
    "__main__",
)
"""A module imports from those above it in this list, and from its own folder."""

HOUSE = Path(compress_search.__file__).parent
MODULES = {path.relative_to(HOUSE).with_suffix("").parts: path for path in sorted(HOUSE.rglob("*.py"))}

every_module = pytest.mark.parametrize("module", MODULES, ids="/".join)


def names_imported_by(path):
    """Everything that a file imports, wherever in it; for ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imports_of(path):
    """The modules of the package that a file imports, as the parts of their paths."""
    inside = (name.split(".") for name in names_imported_by(path) if name.split(".")[0] == "compress_search")
    named = {module for _, *parts in inside for module in (tuple(parts), (*parts, "__init__"))}
    return named & set(MODULES)


def test_every_module_has_its_place_in_the_list():
    assert {module[0] for module in MODULES} == set(ORDER)


@every_module
def test_imports_point_up_the_list(module):
    # The package itself names everything for its users, and imports it only when it is asked for.
    if module != ("__init__",):
        below = {
            name[0] for name in imports_of(MODULES[module]) if ORDER.index(name[0]) > ORDER.index(module[0])
        }
        assert below == set()


def test_no_folder_imports_in_a_circle():
    graph = {
        module: imports_of(path) - {module} for module, path in MODULES.items() if module != ("__init__",)
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


@every_module
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))


@every_module
def test_the_house_is_two_levels_deep_and_every_name_says_something(module):
    assert len(module) <= 2
    assert not {"utils", "helpers", "misc", "manager"} & set(module)


def test_optuna_is_known_to_the_search_and_the_command_line_alone():
    knowing = {
        module[0]
        for module, path in MODULES.items()
        if any(name.split(".")[0] in ("optuna", "optuna_dashboard") for name in names_imported_by(path))
    }
    assert knowing == {"search", "cli"}
