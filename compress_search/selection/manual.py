"""Manual selection: shares that the configuration gives, and the rest of the budget shared uniformly.

A share is what AIMET's manual mode calls the compression ratio of a layer: what it keeps of what it costs.
The units that are named keep their shares, whatever ratio is asked for. All others keep one common share, so
that the whole meets the ratio; so a study that searches the ratio moves the others. Where all are named
nothing is left to choose, and the ratio has to be the one that the shares give.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from compress_search.exceptions import ModelError, RatioError
from compress_search.methods.method import Analysis
from compress_search.plain_text import nearest_names
from compress_search.profile import COUNTED_LAYERS
from compress_search.selection.choices import budget_within_reach, in_words, size_choices, size_of_share
from compress_search.selection.remainder import CLOSE
from compress_search.selection.request import SelectionRequest
from compress_search.selection.table import SensitivityTable
from compress_search.selection.uniform import uniform_sizes


@dataclass(frozen=True)
class Manual:
    """The selector; see :class:`compress_search.selection.Selector`. It needs no table."""

    needs_table: bool = False

    def select(
        self, analysis: Analysis, request: SelectionRequest, table: SensitivityTable | None = None
    ) -> dict[str, int]:
        """Choose sizes by ``request.shares``, and the others uniformly.

        A share is rounded down to a size, and up to the smallest size that the unit may take.

        Raises:
            ModelError: A name or pattern matches no unit, or several disagree on one; all faults at once.
            RatioError: The ratio cannot be reached with these shares; the ratio that they give is named.
        """
        cost = analysis.cost(request.cost)
        choices = size_choices(analysis, request)
        shares = shares_by_unit(analysis, request.shares)
        fixed = {
            name: size_of_share(cost, name, share, choices[name])
            for name, share in shares.items()
            if share < 1 and name in choices
        }
        free = {name: sizes for name, sizes in choices.items() if name not in shares}
        if fixed and not free:
            return _as_asked(cost.of(fixed) / cost.of({}), request, fixed)
        budget = budget_within_reach(analysis, request, free, fixed=fixed)
        whole = cost.of(fixed)
        if whole < (1 - CLOSE) * budget:
            return _as_asked(whole / cost.of({}), request, fixed)
        return uniform_sizes(cost, free, budget, fixed=fixed)


def _as_asked(achieved: float, request: SelectionRequest, fixed: dict[str, int]) -> dict[str, int]:
    """The sizes of the named units, if they give the ratio by themselves.

    Raises:
        RatioError: They do not.
    """
    if (1 - CLOSE) * request.ratio <= achieved <= request.ratio:
        return fixed
    relation = "above" if achieved > request.ratio else "below"
    raise RatioError(
        f"The shares alone give a ratio of {in_words(achieved)}, {relation} the {request.ratio:.4f} asked "
        f"for, and no other unit can make that good. Ask for {in_words(achieved)}, or change the shares."
    )


def shares_by_unit(analysis: Analysis, shares: Mapping[str, float]) -> dict[str, float]:
    """Find the units that names and patterns mean.

    An exact name counts more than patterns. A name may also be that of a layer that is left alone, if its
    share is 1.

    Args:
        analysis: A method's view of the model.
        shares: Shares by unit name or by a pattern in which ``*`` stands for anything.

    Raises:
        ModelError: A name or pattern matches no unit, or several disagree on one; all faults at once.
    """
    names = [unit.name for unit in analysis.units]
    found: dict[str, float] = {}
    faults = []
    for pattern, share in shares.items():
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches and not (share == 1 and pattern in analysis.left_alone):
            faults.append(f"shares names {pattern!r}, {_why_not(analysis, pattern)}")
        faults += [
            f"shares gives {name!r} both {found[name]:g} and {share:g}, by two patterns. Name it, or make "
            "the patterns narrower."
            for name in matches
            if name not in shares and found.setdefault(name, share) != share
        ]
    if faults:
        raise ModelError("\n".join(faults))
    return found | {name: shares[name] for name in names if name in shares}


def check_share_names(shares: Mapping[str, float], model: nn.Module) -> None:
    """Find names of shares that no method can know, before anything is compressed.

    Layers are factorised into parts that have names below theirs, so a name may go on after a layer's; and of
    a pattern only what stands before its first ``*`` can be judged.

    Args:
        shares: Shares by name or pattern.
        model: The original model.

    Raises:
        ModelError: A name is that of nothing in the model; all faults at once.
    """
    modules = model.named_modules()
    names = [n for n, m in modules if n and (isinstance(m, COUNTED_LAYERS) or not any(m.children()))]
    faults = []
    for pattern in shares:
        start = re.split(r"[*?[]", pattern, maxsplit=1)[0]
        is_pattern = start != pattern
        if any(
            start == n or start.startswith(f"{n}.") or (is_pattern and n.startswith(start)) for n in names
        ):
            continue
        remedy = nearest_names(pattern, names, otherwise="There are")
        faults.append(f"shares names {pattern!r}, which is no layer of the model. {remedy}")
    if faults:
        raise ModelError("\n".join(faults))


def _why_not(analysis: Analysis, pattern: str) -> str:
    names = [unit.name for unit in analysis.units]
    together = [unit.name for unit in analysis.units if pattern in unit.layers]
    if pattern in analysis.left_alone:
        return f"which is left alone: {analysis.left_alone[pattern]}."
    if together:
        return f"whose channels are sized with others. Name {' or '.join(map(repr, together))}."
    remedy = nearest_names(pattern, names, otherwise="There are")
    return f"which matches nothing that can be sized. {remedy}"
