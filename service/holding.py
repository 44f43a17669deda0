"""Room in limits, held for the rows of a batch from before their draw until it is known what they executed.

Duty: between groups of rows, which are split and handed over, and `limits.py`, which knows rows by their place only. No
rule that counts executions: nothing is held, and nobody waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from policies.types import Bools, Choices
from safety.mask import request_mask
from service.judge import Past
from service.limits import LimitRow, Limits, Reserved
from service.plan import Group, Safeguards


@dataclass(frozen=True, slots=True)
class Held:
    """What was reserved for rows, by their places in the batch."""

    limits: Limits
    reserved: Reserved
    at: Mapping[int, int]  # place in the batch -> place in `reserved`

    def past(self, group: Group, now_s: float) -> Past:
        """What limits say of a group's rows; nothing, which denies, if it has taken too long to come to the draw."""
        if not self.reserved.holds(now_s):
            return Past.unasked(len(group.rows))
        rows = [self.at[index] for index in group.index]
        verdicts = {each.name: type(each)(each.name, each.allowed[rows]) for each in self.reserved.verdicts}
        return Past([self.reserved.previous[row] for row in rows], np.asarray(self.reserved.past)[rows], verdicts)

    def settle(self, executed: Mapping[int, tuple[float, ...] | None]) -> None:
        """Tell what each row executed, by its place in the batch; None: nothing."""
        actions: list[tuple[float, ...] | None] = [None] * len(self.at)
        for index, action in executed.items():
            actions[self.at[index]] = action
        self.limits.settle(self.reserved.token, actions)


def waves(groups: list[Group], safeguards: Safeguards) -> list[list[Group]]:
    """Cut a batch so that no two rows of a part have the same key, where limits are kept by key; in order of time."""
    if safeguards.limits is None or safeguards.ruling is None or not safeguards.ruling.limits.by_key:
        return [groups]
    turn: dict[int, int] = {}
    seen: dict[str, int] = {}
    found = [(i, row.key) for group in groups for i, row in zip(group.index, group.rows, strict=True)]
    for index, key in sorted(found, key=lambda each: each[0]):
        if key is not None:
            seen[key] = turn[index] = seen.get(key, -1) + 1
    if max(turn.values(), default=0) == 0:
        return [groups]
    parts: list[list[Group]] = [[] for _ in range(max(turn.values()) + 1)]
    for group in groups:
        for wave, part in enumerate(parts):
            rows = [i for i, index in enumerate(group.index) if turn.get(index, 0) == wave]
            if rows:
                part.append(group if len(rows) == len(group.rows) else group.some(rows))
    return parts


async def reserve(groups: list[Group], safeguards: Safeguards) -> Held | None:
    """Hold room for every row; None where no rule counts executions."""
    if safeguards.limits is None:
        return None
    found = [(index, group.rows[i].key, group) for group in groups for i, index in enumerate(group.index)]
    order = sorted(found, key=lambda each: each[0])
    rows = [LimitRow(key, group.version.bundle.fallback) for _, key, group in order]
    reserved = await safeguards.limits.reserve(rows, _possible(groups))
    return Held(safeguards.limits, reserved, {index: place for place, (index, _, _) in enumerate(order)})


def _possible(groups: list[Group]) -> Bools | None:
    """What callers allow, bool [B, N] in the order of the batch, so that no room is held for anything else."""
    space = groups[0].plan.action
    if not isinstance(space, Choices):
        return None
    allowed = {i: mask for group in groups for i, mask in zip(group.index, group.masks, strict=True)}
    return request_mask([allowed[i] for i in sorted(allowed)], space.size)
