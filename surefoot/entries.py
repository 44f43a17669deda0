"""One entry of a transitions stream: its fields, and what they mean. Pure.

Duty: the only place in this package that knows the short field names and the codecs of an entry. It knows nothing of
Redis. An entry is read without rounding or guessing; what cannot be read raises `Unreadable` and names the entry.
Promise: fields and record fields that are not known here are ignored, so that a newer minor version can be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from surefoot.errors import Unreadable

SCHEMA_VERSION = 1

TERMINATED, TRUNCATED = 1, 2  # bits of `tf`

Fields = Mapping[bytes, bytes]
Spec = tuple[str, tuple[int, ...], int]  # dtype and shape of a state, number of actions
Identity = tuple[str, int, int]  # producer, epoch, seq


class Record(msgspec.Struct, frozen=True):
    """What is read of a decision's record; the service writes more."""

    assigned_version: str
    version: str
    dtype: str
    shape: tuple[int, ...]
    target: bytes
    behaviour: bytes
    epsilon: float
    explored: bool
    proposed: int
    propensity: float | None
    action_name: str = ""
    role: str = ""
    propensity_reason: str | None = None
    overridden: bool = False
    rules: tuple[str, ...] = ()
    fallback: str | None = None
    weight: float = 1.0
    switched: bool = False
    key: str | None = None
    context: dict[str, Any] | None = None


class RewardRecord(msgspec.Struct, frozen=True):
    """What is read of a reward's record."""

    metrics: dict[str, float] | None = None


_record = msgspec.msgpack.Decoder(Record)
_reward_record = msgspec.msgpack.Decoder(RewardRecord)


@dataclass(frozen=True, slots=True)
class Row:
    """One transition as it stands in the stream. `next_state` and `next_mask` are empty where there is none."""

    stream_id: bytes
    identity: Identity
    spec: Spec
    id: str
    episode: str
    step: int
    at_ms: int
    action: int
    state: bytes
    mask: bytes
    reward: float  # NaN where the decision was voided
    join: str
    end: str
    bootstrap: bool
    next_state: bytes
    next_mask: bytes
    next_id: str
    order: str
    reward_at_ms: int | None
    reward_id: str
    flags: int
    record: Record
    metrics: dict[str, float] | None

    @classmethod
    def read(cls, stream_id: bytes, fields: Fields) -> Row:
        """Read an entry. Raises Unreadable."""
        try:
            if int(fields[b"v"]) > SCHEMA_VERSION:
                raise Unreadable(f"entry {stream_id.decode()} has schema version {int(fields[b'v'])}: upgrade surefoot")
            return cls._read(stream_id, fields)
        except (KeyError, ValueError, TypeError, msgspec.MsgspecError) as error:
            raise Unreadable(f"entry {stream_id.decode()} cannot be read: {error!r}") from error

    @classmethod
    def _read(cls, stream_id: bytes, fields: Fields) -> Row:
        text = {name: fields[name].decode() for name in (b"i", b"p", b"ep", b"j", b"x", b"r")}
        record = _record.decode(fields[b"d"])
        state, mask = fields[b"s"], fields[b"m"]
        spec = (np.dtype(record.dtype).str, record.shape, len(mask))
        _check_sizes(record, state, mask)
        # A next state of another shape is another observation: the policy was changed in between. It cannot be
        # learnt from together with this one, so the transition ends here.
        cut = len(fields[b"n"]) not in (0, len(state))
        next_mask = fields.get(b"nm", b"")
        accepted = fields.get(b"at", b"")
        return cls(
            stream_id=stream_id,
            identity=(text[b"p"], int(fields[b"e"]), int(fields[b"q"])),
            spec=spec,
            id=text[b"i"],
            episode=text[b"ep"],
            step=int(fields[b"st"]),
            at_ms=int(fields[b"t"]),
            action=int(fields[b"a"]),
            state=state,
            mask=mask,
            reward=float(text[b"r"]) if text[b"r"] else math.nan,
            join=text[b"j"],
            end="lost" if cut else text[b"x"],
            bootstrap=fields[b"b"] == b"1" and not cut,
            next_state=b"" if cut else fields[b"n"],
            next_mask=next_mask if len(next_mask) == len(mask) and not cut else b"",
            next_id=fields.get(b"ni", b"").decode(),
            order=fields.get(b"o", b"").decode(),
            reward_at_ms=int(accepted) if accepted else None,
            reward_id=fields.get(b"ri", b"").decode(),
            flags=int(fields.get(b"tf") or b"0"),
            record=record,
            metrics=_reward_record.decode(fields[b"rd"]).metrics if fields.get(b"rd") else None,
        )

    @property
    def terminated(self) -> bool:
        return self.end == "terminated" or bool(self.flags & TERMINATED)

    @property
    def truncated(self) -> bool:
        return self.end == "truncated" or bool(self.flags & TRUNCATED)

    @property
    def reward_delay_ms(self) -> float:
        """From the decision to the acceptance of its reward; NaN where none came."""
        return math.nan if self.reward_at_ms is None else float(self.reward_at_ms - self.at_ms)

    def plain(self, policy: str) -> dict[str, Any]:
        """Give the transition as values that JSON can hold; None where there is nothing."""
        producer, epoch, seq = self.identity
        record = self.record
        return {
            "id": self.id,
            "policy": policy,
            "episode": self.episode or None,
            "step": None if self.step < 0 else self.step,
            "at_ms": self.at_ms,
            "state": self._observation(self.state),
            "action": self.action,
            "action_name": record.action_name or None,
            "reward": None if math.isnan(self.reward) else self.reward,
            "next_state": self._observation(self.next_state),
            "terminated": self.terminated,
            "truncated": self.truncated,
            "bootstrap": self.bootstrap,
            "end": self.end,
            "join": self.join,
            "propensity": record.propensity,
            "propensity_reason": record.propensity_reason,
            "behaviour": np.frombuffer(record.behaviour, "<f8").tolist(),
            "target": np.frombuffer(record.target, "<f8").tolist(),
            "mask": list(self.mask),
            "next_mask": list(self.next_mask) or None,
            "next_id": self.next_id or None,
            "epsilon": record.epsilon,
            "explored": record.explored,
            "proposed": record.proposed,
            "overridden": record.overridden,
            "rules": list(record.rules),
            "fallback": record.fallback,
            "version": record.version,
            "assigned_version": record.assigned_version,
            "role": record.role or None,
            "weight": record.weight,
            "switched": record.switched,
            "key": record.key,
            "context": record.context,
            "order": self.order or None,
            "reward_at_ms": self.reward_at_ms,
            "reward_id": self.reward_id or None,
            "metrics": self.metrics,
            "producer": producer,
            "epoch": epoch,
            "seq": seq,
            "stream_id": self.stream_id.decode(),
        }

    def _observation(self, raw: bytes) -> Any:
        return np.frombuffer(raw, self.spec[0]).reshape(self.spec[1]).tolist() if raw else None


def _check_sizes(record: Record, state: bytes, mask: bytes) -> None:
    expected = math.prod(record.shape) * np.dtype(record.dtype).itemsize
    if len(state) != expected:
        raise ValueError(f"a state of {len(state)} bytes, {expected} expected")
    for name in ("behaviour", "target"):
        if len(getattr(record, name)) != 8 * len(mask):
            raise ValueError(f"{name} and mask differ in length")
