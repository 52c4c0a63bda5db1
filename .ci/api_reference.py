"""Build the API reference from the docstrings into ``build/api``; any warning is an error.

Run by ``make docs``.
"""

from __future__ import annotations

import pkgutil
import re
import warnings
from pathlib import Path
from typing import Any

import pdoc

import compress_search

PACKAGE = compress_search.__name__
OUTPUT = Path(__file__).parents[1] / "build" / "api"

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")


def plain_links(member: pdoc.doc.Doc[Any]) -> None:
    """Turn Sphinx's roles into the code spans that pdoc makes links of, in a thing and all that is in it."""
    member.docstring = ROLE.sub(r"`\1`", member.docstring)
    if isinstance(member, pdoc.doc.Namespace):
        for inner in member.own_members:
            plain_links(inner)


def main() -> None:
    """Write one page a module, and an index."""
    warnings.simplefilter("error")
    for name in compress_search.__all__:
        # What is imported at its first use is seen by pdoc only after it.
        getattr(compress_search, name)
    found = pkgutil.walk_packages(compress_search.__path__, f"{PACKAGE}.")
    names = [PACKAGE, *sorted(module.name for module in found if not module.name.endswith("__main__"))]
    modules = {name: pdoc.doc.Module.from_name(name) for name in names}
    pdoc.render.configure(docformat="google")
    for name, module in modules.items():
        plain_links(module)
        file = OUTPUT / f"{name.replace('.', '/')}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(pdoc.render.html_module(module, modules))
    (OUTPUT / "index.html").write_text(pdoc.render.html_index(modules))
    (OUTPUT / "search.js").write_text(pdoc.render.search_index(modules))
    print(f"{len(modules)} modules: {OUTPUT / PACKAGE}.html")


if __name__ == "__main__":
    main()
