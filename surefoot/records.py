"""What rides along with an entry of a stream as msgpack: the record of a decision, and of a reward. Pure.

Duty: the part of the service's records that is read here; fields that are not known are ignored, so that a newer minor
version can be read.
"""

from __future__ import annotations

from typing import Any

import msgspec

from surefoot.spaces import Kind


class Record(msgspec.Struct, frozen=True):
    """What is read of a decision's record; the service writes more. From `raw_action` on: continuous actions only."""

    assigned_version: str
    version: str
    dtype: str
    shape: tuple[int, ...]
    target: bytes
    behaviour: bytes
    epsilon: float
    explored: bool
    proposed: int | tuple[int | float, ...]
    propensity: float | None
    action_name: str | list[str] | None = None
    role: str = ""
    propensity_reason: str | None = None
    overridden: bool = False
    rules: tuple[str, ...] = ()
    fallback: str | None = None
    weight: float = 1.0
    switched: bool = False
    key: str | None = None
    context: dict[str, Any] | None = None
    action_kind: Kind = "discrete"
    nvec: tuple[int, ...] = ()  # sizes of the factors, multi_discrete only
    propensity_kind: str = "mass"
    log_propensity: float | None = None
    state_reset: bool = False
    raw_action: bytes = b""  # float64 [D], the draw before squash and projection
    raw_log_prob: float | None = None  # its log-density under the part that drew it
    sigma: bytes = b""  # float64 [D], deviation of the exploring part; empty: there was none
    at_bound: tuple[int, ...] = ()  # -1 at the low end of the box, 1 at the high end, 0 between
    transform: str = "none"  # from raw actions to executed ones: none | unscale | tanh
    bounds: bytes = b""  # float64 [2·D], the action space's own low and high


class RewardRecord(msgspec.Struct, frozen=True):
    """What is read of a reward's record."""

    metrics: dict[str, float] | None = None


decode_record = msgspec.msgpack.Decoder(Record).decode
decode_reward = msgspec.msgpack.Decoder(RewardRecord).decode
