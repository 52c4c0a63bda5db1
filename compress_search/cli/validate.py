"""``compress-search validate``: everything that can be checked before any work starts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from compress_search.cli.run import add_preset_option
from compress_search.plain_text import format_table

if TYPE_CHECKING:
    from compress_search.methods.method import Analysis
    from compress_search.profile import ModelProfile


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "validate",
        help="check a configuration, its task and its model; start nothing",
        description="Check the configuration, import the task, run the model once, evaluate it once, and "
        "show what each method can compress. No study is created and nothing is written.",
        epilog="Example: compress-search validate configs/digits.yaml target=0.3",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="replaces a value of the file: fine_tune.epochs=6"
    )
    add_preset_option(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Check, and print the model's profile."""
    from compress_search.cli.log import logging_to_terminal
    from compress_search.config import StudyConfig
    from compress_search.device import choose_device
    from compress_search.methods import METHODS
    from compress_search.search.storage import check_storage
    from compress_search.search.study import check_settings
    from compress_search.workspace import Workspace

    config = StudyConfig.load(args.config, args.overrides, preset=args.preset)
    workspace = Workspace(config.workspace)
    workspace.check()
    check_storage(config.storage, workspace)
    with logging_to_terminal():
        task, device = config.load_task(), choose_device(config.device)
        model = task.build_model()
        task.check(model, device)
        search, example = config.search, task.example_input.to(device)
        profile = check_settings(search, task, model, device)
        analyses = {
            name: METHODS[name].analyse(
                model, example, ignore=search.ignore, keep_channels=search.keep_channels
            )
            for name in search.methods
        }
        accuracy = task.score(model)
    print(f"{args.config} is sound. Task {task.name!r}: validation accuracy {100 * accuracy:.2f} %, ", end="")
    print(f"{profile.macs:,} MACs, {profile.params:,} parameters.\n")
    print(format_table(_layer_rows(profile)))
    for name, analysis in analyses.items():
        print(f"\n{name} can size:\n{format_table(_unit_rows(analysis))}")
        for layer, reason in analysis.left_alone.items():
            print(f"It leaves {layer} alone: {reason}")
    return 0


def _layer_rows(profile: ModelProfile) -> list[list[str]]:
    rows = [["layer", "kind", "weight", "MACs", "% of all"]]
    for layer in profile.layers:
        shape, share = "x".join(map(str, layer.weight_shape)), layer.macs / profile.macs
        rows.append([layer.name, layer.kind, shape, f"{layer.macs:,}", f"{100 * share:.1f}"])
    return rows


def _unit_rows(analysis: Analysis) -> list[list[str]]:
    rows = [["unit", "sizes", "layers it makes cheaper"]]
    return rows + [
        [unit.name, f"{unit.least}-{unit.full_size}", ", ".join(unit.layers)] for unit in analysis.units
    ]
