"""Limits on what was executed: rates, cooldowns and running costs as one thing. Pure.

Duty: bind a rule to a policy's choices, and say which actions fit the room that is left. It does not know where counts
are kept: `past.py` keeps them in a replica, `service/limits.lua` in Redis, `places.py` holds a leased portion of them.
Strategy: each rule becomes two whole numbers for each choice. `need`: the room there must be for it. `charge`: what its
execution takes, for `window_ms`. Room is `cap` less all charges in the window, less all that is held for rows that may
yet execute.

    rate      need 1, charge 1 for the rule's actions; cap is the limit
    cost      need and charge are the cost, in units of the last decimal written; cap likewise
    cooldown  need 1 for `actions`, charge 1 for `after`; cap 1

Promise: before the draw a row holds the largest charge that it may come to, so however the draw falls, the sum of
charges in any window stays within the cap; only what a rule does not mask (a fallback it is excepted for) passes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal

import numpy as np

from policies.types import ActionSpec, Bools, Choices, Ints
from safety.factor import the_factor
from safety.facts import Masked
from safety.rules import Base, Cooldown, Cost, MaxStep, Rate, Scope

Keeper = Literal["redis", "leased", "local"]

# How many digits after the point are counted exactly; beyond, costs are rounded up and caps down.
DECIMALS: Final = 9
EXACT: Final = 2**53  # Redis counts in doubles


@dataclass(frozen=True, slots=True)
class Entry:
    """What a row may come to under one limit. least: the fallback's charge. levels: by index, None: all of them."""

    least: int = 0
    levels: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Limit:
    """A rule bound to a space. N is the space's size.

    name: the rule's. field: under which its charges are kept, by key or for the policy: a rule that is changed but for
    its name and its unit keeps its count. need: int64 [N], zero outside `factor`. charges: of each choice of `factor`.
    """

    name: str
    field: str
    per: Literal["key", "policy"]
    keeper: Keeper
    window_ms: int
    cap: int
    factor: int
    need: Ints
    charges: tuple[int, ...]
    start: int  # the factor's first column

    @cached_property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """The different pairs (need, charge), but (0, 0)."""
        return tuple(sorted(set(self._pairs()) - {(0, 0)}))

    @cached_property
    def members(self) -> Bools:
        """bool [N, L], which choice is of which level."""
        found = np.zeros((len(self.need), len(self.levels)), dtype=np.bool_)
        for choice, pair in enumerate(self._pairs()):
            if pair in self.levels:
                found[self.start + choice, self.levels.index(pair)] = True
        return found

    @property
    def quantum(self) -> int:
        """The room in which each of the actions fits."""
        return int(self.need.max())

    def charge(self, action: Sequence[float] | None) -> int:
        """Say what the execution of an action takes; None: nothing was executed."""
        return 0 if action is None else self.charges[int(action[self.factor])]

    def entries(self, fallbacks: Sequence[Sequence[float] | None], possible: Bools | None) -> list[Entry]:
        """What B rows may come to. possible: bool [B, N], what other rules leave; None: everything."""
        least = [self.charge(fallback) for fallback in fallbacks]
        if possible is None:
            return [Entry(each) for each in least]
        reached: Bools = np.asarray((possible[:, :, None] & self.members[None]).any(axis=1))
        levels = [None if all(row) else tuple(np.flatnonzero(row).tolist()) for row in reached.tolist()]
        return [Entry(*each) for each in zip(least, levels, strict=True)]

    def worst(self, room: int, entry: Entry) -> int:
        """The largest charge that a row may come to, given room."""
        chosen = self.levels if entry.levels is None else [self.levels[index] for index in entry.levels]
        return max([entry.least, *(charge for need, charge in chosen if need == 0 or need <= room)])

    def allow(self, rooms: Sequence[int]) -> Masked:
        """Give the verdict over B rows. rooms: what is left for each."""
        room = np.asarray(rooms, dtype=np.int64)[:, None]
        return Masked(self.name, (self.need[None] == 0) | (self.need[None] <= room))

    def _pairs(self) -> list[tuple[int, int]]:
        needs = self.need[self.start : self.start + len(self.charges)].tolist()
        return list(zip(needs, self.charges, strict=True))


@dataclass(frozen=True)
class LimitSet:
    """All limits of a policy, by who keeps them. remembers: where the last executed action is kept, if a rule asks."""

    all: tuple[Limit, ...] = ()
    remembers: Literal["shared", "local"] | None = None
    keyed: tuple[Limit, ...] = field(init=False)  # per key, in Redis
    strict: tuple[Limit, ...] = field(init=False)  # per policy, in Redis
    leased: tuple[Limit, ...] = field(init=False)  # per policy, in portions
    local: tuple[Limit, ...] = field(init=False)

    def __post_init__(self) -> None:
        redis = [each for each in self.all if each.keeper == "redis"]
        object.__setattr__(self, "keyed", tuple(each for each in redis if each.per == "key"))
        object.__setattr__(self, "strict", tuple(each for each in redis if each.per == "policy"))
        object.__setattr__(self, "leased", tuple(each for each in self.all if each.keeper == "leased"))
        object.__setattr__(self, "local", tuple(each for each in self.all if each.keeper == "local"))

    @property
    def asks_redis(self) -> bool:
        """Whether rows wait for Redis."""
        return bool(self.keyed or self.strict or self.remembers == "shared")

    @property
    def by_key(self) -> bool:
        """Whether a batch may hold one row of a key at most."""
        return self.remembers is not None or any(each.per == "key" for each in self.all)


def bind(rules: Sequence[Base], space: ActionSpec) -> LimitSet:
    """Bind the rules that count executions; others are passed over.

    Raises SafetyError or UnknownAction where one does not fit, OverflowError where its numbers are too large.

    Of several rules on the last action, one that asks for the shared one decides: it is right for all.
    """
    steps = {rule.scope for rule in rules if isinstance(rule, MaxStep)}
    remembers: Literal["shared", "local"] | None = None
    if steps:
        remembers = "shared" if "shared" in steps else "local"
    if not isinstance(space, Choices):
        return LimitSet(remembers=remembers)
    return LimitSet(tuple(_bound(rule, space) for rule in rules if isinstance(rule, Rate | Cooldown | Cost)), remembers)


def _bound(rule: Rate | Cooldown | Cost, space: Choices) -> Limit:
    factor = the_factor(rule.factor, space)
    needs, charges, cap, unit = _numbers(rule, space, factor)
    start = space.starts[factor]
    need = np.zeros(space.size, dtype=np.int64)
    need[start : start + len(needs)] = needs
    # An execution that a rule counts without masking it cannot wait for a portion: every replica must hear of it.
    counts_freely = any(charge > each for each, charge in zip(needs, charges, strict=True))
    return Limit(
        name=rule.name,
        field=rule.name + unit,
        per=rule.per,
        keeper=_keeper(rule.per, rule.scope, counts_freely),
        window_ms=round(1000 * (rule.seconds if isinstance(rule, Cooldown) else rule.window_s)) or 1,
        cap=cap,
        factor=factor,
        need=need,
        charges=tuple(charges),
        start=start,
    )


def _keeper(per: str, scope: Scope, counts_freely: bool) -> Keeper:
    if scope == "local":
        return "local"
    return "leased" if per == "policy" and scope == "shared" and not counts_freely else "redis"


def _numbers(rule: Rate | Cooldown | Cost, space: Choices, factor: int) -> tuple[list[int], list[int], int, str]:
    """Give needs and charges by choice, the cap, and the unit they are counted in."""
    size = space.nvec[factor]
    if isinstance(rule, Cost):
        prices, cap, decimals = whole(rule.costs, rule.cap)
        costs = [0] * size
        for name, price in prices.items():
            costs[space.index(name, f"{rule.name}.costs", factor)] = price
        return costs, costs, cap, f":{decimals}"
    named = {space.index(each, f"{rule.name}.actions", factor) for each in rule.actions}
    needs = [int(choice in named) for choice in range(size)]
    if isinstance(rule, Rate) or rule.after is None:
        return needs, needs, rule.limit if isinstance(rule, Rate) else 1, ""
    after = {space.index(each, f"{rule.name}.after", factor) for each in rule.after}
    return needs, [int(choice in after) for choice in range(size)], 1, ""


def whole(costs: Mapping[str, float], cap: float) -> tuple[dict[str, int], int, int]:
    """Count in units of the last decimal written, so that ten times 0.1 fit into 1. Gives costs, cap and decimals.

    Raises OverflowError where the numbers are too large to be counted exactly.
    """
    numbers = [*costs.values(), cap]
    if max(numbers) >= EXACT:
        raise OverflowError("too large to be counted exactly")
    exactly = (d for d in range(DECIMALS + 1) if all(round(each * 10**d) / 10**d == each for each in numbers))
    decimals = next(exactly, DECIMALS)
    if max(numbers) * 10**decimals >= EXACT:
        raise OverflowError("too large to be counted exactly")
    units = {name: _units(each, 10**decimals, up=True) for name, each in costs.items()}
    return units, _units(cap, 10**decimals, up=False), decimals


def _units(number: float, scale: int, up: bool) -> int:
    nearest = round(number * scale)
    if nearest / scale == number:
        return nearest
    above, below = number.as_integer_ratio()
    return -(-above * scale // below) if up else above * scale // below
