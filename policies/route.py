"""Which version decides for a unit: sticky, by hash, by weight. Pure.

`bucket = blake2b(policy salt, challenger label, unit) mod 10000`. The challenger owns the lowest buckets, so raising
its weight only moves units to it, and the next challenger, whose label enters the hash, meets other units.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import cast

from policies.deployment import RouteBy
from policies.types import Role

BUCKETS = 10_000


@dataclass(frozen=True, slots=True)
class Assignment:
    """The version that routing chose, its role, the routing weight it had at that time, and of which control state."""

    version: str
    role: Role
    weight: float
    generation: int = 0  # 0: not known


@dataclass(frozen=True, slots=True)
class Routes:
    """Who decides. `weight` is the challenger's share; the champion has the rest."""

    salt: bytes
    champion: str
    challenger: str | None = None
    weight: float = 0.0
    route_by: RouteBy | None = None
    generation: int = 0  # of the control state that says so
    to_champion: Assignment = field(init=False)  # what is assigned is one of two values
    to_challenger: Assignment | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        champion = Assignment(self.champion, "champion", 1.0 - self.weight, self.generation)
        object.__setattr__(self, "to_champion", champion)
        if self.challenger is not None:
            challenger = Assignment(self.challenger, "challenger", self.weight, self.generation)
            object.__setattr__(self, "to_challenger", challenger)


def bucket(salt: bytes, challenger: str, unit: str) -> int:
    """Place a unit in 0..9999, differently for each challenger and policy."""
    digest = blake2b(f"{challenger}\0{unit}".encode(), digest_size=8, key=salt, person=b"surefoot-route").digest()
    return int.from_bytes(digest, "big") % BUCKETS


def unit_of(route_by: RouteBy | None, key: str | None, episode: str | None, decision: str) -> str:
    """What is routed as one: the kind asked for if the caller named it, else the first of key, episode, decision."""
    chosen = {"key": key, "episode": episode, "decision": decision, None: None}[route_by]
    return chosen or key or episode or decision


def assign(routes: Routes, unit: str) -> Assignment:
    """Assign a unit to a version."""
    if routes.challenger is not None and bucket(routes.salt, routes.challenger, unit) < routes.weight * BUCKETS:
        return cast(Assignment, routes.to_challenger)
    return routes.to_champion
