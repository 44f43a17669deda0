"""What a policy may spend on exploration, as it is written. Pure.

Duty: one struct that is read from JSON, or from a parsed YAML document, and checks itself with errors that name the
field. Who spends is `budget.py`; what is left comes from `lease.py`.
Promise: the digest is the same for the same meaning, whatever the order of the fields.
"""

from __future__ import annotations

import math
from hashlib import sha256
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from policies.errors import InvalidField
from safety.burn import BurnLimit
from safety.schedule import Schedule, ends, strength

# Regret is counted in whole millionths, so that sums are exact here and in Redis, in any order.
MICRO: Final = 1_000_000
Kind = Literal["rate", "share", "regret"]
WindowSeconds = Annotated[float, Meta(ge=1, le=31 * 86_400)]


class RateCap(Struct, forbid_unknown_fields=True, frozen=True):
    """At most `limit` explored decisions in a window."""

    limit: Annotated[int, Meta(ge=0, le=1_000_000_000)]
    window_s: WindowSeconds


class ShareCap(Struct, forbid_unknown_fields=True, frozen=True):
    """Explored decisions are at most `limit` of all decisions in a window."""

    limit: Annotated[float, Meta(ge=0, le=1)]
    window_s: WindowSeconds


class RegretCap(Struct, forbid_unknown_fields=True, frozen=True):
    """The prices of explored decisions in a window add up to `limit` at most. A price lies between 0.01 and 1."""

    limit: Annotated[float, Meta(ge=0, le=1_000_000_000)]
    window_s: WindowSeconds


class Cap(Struct, frozen=True, array_like=True):
    """One cap in the terms of leases. limit: decisions, a share, or millionths; unit: what one row takes at most."""

    kind: Kind
    limit: float
    window_ms: int
    unit: int


class Exploration(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True):
    """How much a policy explores, and what that may cost.

    epsilon, sigma: in place of the version's own; None: the version's own. temperature: exploring draws choices from
    softmax(q/T); None: uniformly. rate, share, regret: caps, of which every one holds. burn: when exploration halts by
    itself. freeze: nothing is explored; when_frozen: whether heads that are stochastic by themselves go on sampling, or
    answer with their mode. start: a budget begins with the next window after it was set, or after Redis lost its
    memory, because nobody knows any more what was spent in the running one; `now` begins at once, at the price of up to
    one cap more in such a window.
    """

    epsilon: Schedule | float | None = None
    temperature: Schedule | float | None = None
    sigma: Schedule | float | None = None
    rate: RateCap | None = None
    share: ShareCap | None = None
    regret: RegretCap | None = None
    burn: BurnLimit | None = None
    freeze: bool = False
    when_frozen: Literal["sample", "mode"] = "sample"
    start: Literal["next_window", "now"] = "next_window"

    def __post_init__(self) -> None:
        _check("epsilon", self.epsilon, 0.0, 1.0)
        _check("temperature", self.temperature, 1e-6, 1e6)
        _check("sigma", self.sigma, 0.0, 1e6)

    @property
    def digest(self) -> str:
        """Hex digest of what the document means."""
        return sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()

    @property
    def progress_of(self) -> str:
        """Names the schedules: while it stays the same, they go on where they are."""
        schedules = {"epsilon": self.epsilon, "temperature": self.temperature, "sigma": self.sigma}
        return sha256(msgspec.json.encode(schedules, order="deterministic")).hexdigest()[:16]

    @property
    def caps(self) -> tuple[Cap, ...]:
        """The caps that are set."""
        caps: list[Cap] = []
        if self.rate is not None:
            caps.append(Cap("rate", self.rate.limit, _ms(self.rate.window_s), 1))
        if self.share is not None:
            caps.append(Cap("share", self.share.limit, _ms(self.share.window_s), 1))
        if self.regret is not None:
            caps.append(Cap("regret", math.floor(self.regret.limit * MICRO), _ms(self.regret.window_s), MICRO))
        return tuple(caps)

    def wanted(self, own_epsilon: float, decisions: float = 0, elapsed_s: float = 0.0) -> float:
        """The ε that is wanted before any budget: the schedule's, else the version's own; none while frozen."""
        if self.freeze:
            return 0.0
        return own_epsilon if self.epsilon is None else strength(self.epsilon, decisions, elapsed_s)


def parse_exploration(document: object, where: str = "exploration") -> Exploration:
    """Read a parsed JSON or YAML document. Raises InvalidField naming the field."""
    try:
        return msgspec.convert(document, Exploration)
    except msgspec.ValidationError as error:
        raise _refused(error, where) from None


def read_exploration(raw: bytes, where: str = "exploration") -> Exploration:
    """Read JSON. Raises InvalidField naming the field."""
    try:
        return msgspec.json.decode(raw, type=Exploration)
    except msgspec.DecodeError as error:  # of which ValidationError is one
        raise _refused(error, where) from None


def _refused(error: msgspec.DecodeError, where: str) -> InvalidField:
    message, _, path = str(error).partition(" - at `$")
    named = message.partition(": ")[0]
    field = path.strip(".`") or (named if named in Exploration.__struct_fields__ else "")
    return InvalidField(message, f"{where}.{field}" if field else where)


def _check(name: str, schedule: Schedule | float | None, low: float, high: float) -> None:
    if schedule is not None and not all(low <= end <= high for end in ends(schedule)):
        raise ValueError(f"{name}: strengths lie between {low:g} and {high:g}")


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
