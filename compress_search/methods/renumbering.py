"""Groups of coupled channels, found again after some of their channels have been removed.

Tracing the smaller model anew could find other groups: of few channels, more seems to hang together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from compress_search.methods.coupling import CoupledGroup, Member
from compress_search.plan import Edit, KeepChannels


@dataclass(frozen=True)
class RenumberedGroup:
    """A group as it is in the smaller model.

    Attributes:
        group: Its blocks that are left, with the channels' new numbers.
        blocks: The old number of each block.
    """

    group: CoupledGroup
    blocks: tuple[int, ...]

    def renumber(self, blocks: Collection[int]) -> frozenset[int]:
        """The new numbers of old blocks, of those that are left."""
        return frozenset(new for new, old in enumerate(self.blocks) if old in blocks)


def renumbered(group: CoupledGroup, edits: Sequence[Edit]) -> RenumberedGroup:
    """Say where the channels of a group are after some edits.

    Args:
        group: A group of the model before the edits.
        edits: What was removed, in order; each removes a block of the group from all members or from none.
    """
    places = [_places(member, edits) for member in group.members]
    left = [
        block
        for block in range(group.size)
        if all(
            channel in where
            for member, where in zip(group.members, places, strict=True)
            for channel in member.blocks[block]
        )
    ]
    members = (
        replace(
            member,
            blocks=tuple(tuple(where[channel] for channel in member.blocks[block]) for block in left),
        )
        for member, where in zip(group.members, places, strict=True)
    )
    return RenumberedGroup(replace(group, members=tuple(members)), tuple(left))


def _places(member: Member, edits: Iterable[Edit]) -> dict[int, int]:
    """The new number of each channel of a member that is left, by its old one."""
    places = {channel: channel for block in member.blocks for channel in block}
    for edit in edits:
        if not isinstance(edit, KeepChannels) or edit.layer != member.layer:
            continue
        kept = edit.inputs if member.side == "inputs" else edit.outputs
        if kept is not None:
            new = {old: number for number, old in enumerate(kept)}
            places = {channel: new[place] for channel, place in places.items() if place in new}
    return places
