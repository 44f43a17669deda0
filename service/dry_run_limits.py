"""Limits over recorded decisions: what there would have been room for at each, from those before it alone. Pure.

Strategy: whatever their scope, all are counted by `safety/local.py`, decision by decision in order of time, and charged
with what was executed. A window that reaches back beyond the first decision is thus missing its beginning, and a key's
first decision has no action before it: a replay denies less than the service did, but for `max_step` without `initial`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from policies.types import Bools, Ints
from safety.limits import Entry, Limit, LimitSet
from safety.local import LocalLimits
from safety.past import UNKNOWN
from service.decision import action_text, read_action
from service.dry_run_facts import Seen
from service.judge import Past


@dataclass(frozen=True, slots=True)
class Replayed:
    """What limits found at each decision. rooms: int64 [n] for each. previous: each key's last action before."""

    rooms: Sequence[tuple[Limit, Ints]]
    previous: Sequence[tuple[float, ...] | None]
    known: Bools

    def past(self, at: Ints) -> Past:
        """The past of some of the decisions, by their places."""
        verdicts = {limit.name: limit.allow(rooms[at].tolist()) for limit, rooms in self.rooms}
        return Past([self.previous[i] for i in at.tolist()], np.asarray(self.known[at]), verdicts)


def replay_limits(limits: LimitSet, decisions: Sequence[Seen]) -> Replayed:
    """Replay decisions, which are in order of time."""
    here = LimitSet(tuple(replace(each, keeper="local") for each in limits.all), limits.remembers and "local")
    keeper = LocalLimits(capacity=len(decisions) + 1, hold_ms=1)
    keeper.configure(here)
    entries = {each.name: Entry() for each in here.all}
    rooms, texts = np.zeros((len(here.all), len(decisions)), dtype=np.int64), []
    for place, each in enumerate(decisions):
        room = keeper.reserve(here, each.id, each.key, entries, each.at_ms)
        rooms[:, place] = [room.rooms[limit.name] for limit in here.all]
        texts.append(room.previous)
        keeper.settle(here, each.id, each.key, room.order, each.action, action_text(each.action), each.at_ms)
    return Replayed(
        rooms=list(zip(here.all, rooms, strict=True)),
        previous=[None if text in ("", UNKNOWN) else read_action(text) for text in texts],
        known=np.array([text != UNKNOWN for text in texts], dtype=np.bool_),
    )
