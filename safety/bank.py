"""What a holder of a lease and the bank say to each other. Frozen values, pure leaf.

The bank is one script in Redis (`service/leases.lua`); the holder is `lease.py`. All amounts are absolute and whole:
decisions, or millionths of a price.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from safety.burn import Bucket, BurnState
from safety.exploration import Cap, Kind

TERM_S: Final = 2.0  # how long a lease lasts from before its request left


class Purse(Struct, frozen=True):
    """What a holder tells of one kind: all of it absolute, within one window."""

    window: str
    ceiling: int  # it will use no more than this until it is told otherwise
    used: int
    decisions: int  # made under this window, explored or not
    acked: int  # the last request whose answer, for this window, arrived


class Progress(Struct, frozen=True):
    """How far the schedules have come, as far as anybody knows."""

    schedules: str = ""
    decisions: int = 0
    elapsed_ms: int = 0


class Request(Struct, frozen=True):
    """A holder's call of the bank."""

    holder: str
    seq: int
    generation: int
    start_now: bool
    caps: tuple[Cap, ...]
    purses: dict[Kind, Purse]
    meter_ms: int  # over how long rates are means
    rate: float  # decisions per second that want to explore
    all_rate: float  # all decisions per second
    decisions: int  # made since the last answer: schedules go by it, no cap does
    wanting: int  # those of them that wanted to explore: the pace goes by it
    progress: Progress
    was: BurnState
    will: BurnState  # what the halt becomes, if it still is as it was
    burn_width_ms: int  # 0: there is no halt
    burn_long_ms: int
    term_ms: int = int(TERM_S * 1000)
    release: bool = False
    now_ms: int = 0  # 0: the server's clock


class Granted(Struct, frozen=True, array_like=True):
    """What a holder has of one kind from now on."""

    kind: Kind
    window: str
    ceiling: int
    ends_ms: int  # how long the window still lasts
    pool: int  # what nobody has leased
    limit: float  # of the cap in force
    closed: bool  # nothing is granted in this window: it is not known what was spent in it
    spent: int  # used by all holders, as far as they have reported


class Reply(Struct, frozen=True, array_like=True):
    """The bank's answer."""

    now_ms: int
    purses: list[Granted]
    fleet_rate: float  # decisions per second that want to explore, of all holders
    progress: Progress
    burn: BurnState
    buckets: list[Bucket]
