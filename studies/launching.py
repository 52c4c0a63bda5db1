"""How a study script is launched: as ``compress-search run`` with the configuration that belongs to it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compress_search.cli import main as compress_search


def launch(script: str, description: str | None) -> None:
    """Run the study of a script with the words of the command line, and end the process.

    Args:
        script: The script's ``__file__``; its configuration has the same name.
        description: What the script is for.
    """
    path = Path(script).resolve()
    config = path.parents[1] / "configs" / f"{path.stem}.yaml"
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="hour", help="smoke, hour (default) or full: see the table there")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help=f"replaces a value of configs/{config.name}"
    )
    given = parser.parse_args()
    sys.exit(compress_search(["run", str(config), "--preset", given.preset, *given.overrides]))
