"""One entry of a transitions stream: its fields, and what they mean. Pure.

Duty: the only place in this package that knows the short field names and the codecs of an entry. It knows nothing of
Redis. An entry is read without rounding or guessing; what cannot be read raises `Unreadable` and names the entry.
Promise: fields and record fields that are not known here are ignored, so that a newer minor version can be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np

from surefoot.dedupe import Identity
from surefoot.errors import Unreadable
from surefoot.records import Record as Record
from surefoot.records import RewardRecord as RewardRecord
from surefoot.records import decode_record, decode_reward
from surefoot.spaces import FLOAT, Action, Space, finite, floats
from surefoot.steps import Steps, number, whole

SCHEMA_VERSION = 1

TERMINATED, TRUNCATED = 1, 2  # bits of `tf`

Fields = Mapping[bytes, bytes]


class Spec(NamedTuple):
    """What the transitions of one batch have in common."""

    dtype: str  # of a state
    shape: tuple[int, ...]  # of a state
    space: Space


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
    action: Action
    state: bytes
    mask: bytes
    reward: float  # NaN where there is none: the decision was voided, or its reward is out of range
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
    steps: Steps | None = None  # of an n-step transition: reward and join state are its first step's

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
        text = {name: fields[name].decode() for name in (b"i", b"p", b"ep", b"a", b"x")}
        steps = Steps.read(fields) if b"k" in fields else None
        record = decode_record(fields[b"d"])
        state, mask = fields[b"s"], fields[b"m"]
        spec = Spec(np.dtype(record.dtype).str, record.shape, Space.of(record.action_kind, record.nvec, mask))
        _check_sizes(record, state, spec)
        # A next state of another shape is another observation: the policy was changed in between. It cannot be
        # learnt from together with this one, so the transition ends here.
        cut = len(fields[b"n"]) not in (0, len(state))
        next_mask = fields.get(b"nm", b"")
        accepted = fields.get(b"at", b"")
        return cls(
            stream_id=stream_id,
            identity=(text[b"p"], whole(fields[b"e"]), whole(fields[b"q"])),
            spec=spec,
            id=text[b"i"],
            episode=text[b"ep"],
            step=whole(fields[b"st"]),
            at_ms=whole(fields[b"t"]),
            action=spec.space.read(text[b"a"]),
            state=state,
            mask=mask,
            reward=number(fields[b"r"].decode()) if steps is None else steps.rewards[0],
            join=fields[b"j"].decode() if steps is None else steps.joins[0],
            end="lost" if cut else text[b"x"],
            bootstrap=fields[b"b"] == b"1" and not cut,
            next_state=b"" if cut else fields[b"n"],
            next_mask=next_mask if len(next_mask) == len(mask) and not cut else b"",
            next_id=fields.get(b"ni", b"").decode(),
            order=fields.get(b"o", b"").decode(),
            reward_at_ms=whole(accepted) if accepted else None,
            reward_id=fields.get(b"ri", b"").decode(),
            flags=int(fields.get(b"tf") or b"0"),
            record=record,
            metrics=decode_reward(fields[b"rd"]).metrics if fields.get(b"rd") else None,
            steps=steps,
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

    @property
    def log_propensity(self) -> float:
        """Log of the probability or density of the executed action; NaN where it is not known."""
        if self.record.log_propensity is not None:
            return self.record.log_propensity
        mass = self.record.propensity
        return math.nan if mass is None else math.log(mass) if mass > 0.0 else -math.inf

    def plain(self, policy: str) -> dict[str, Any]:
        """Give the transition as values that JSON can hold; None where there is nothing."""
        producer, epoch, seq = self.identity
        record = self.record
        values = {
            "id": self.id,
            "policy": policy,
            "episode": self.episode or None,
            "step": None if self.step < 0 else self.step,
            "at_ms": self.at_ms,
            "state": self._observation(self.state),
            "action_kind": record.action_kind,
            "action": self.action,
            "action_name": record.action_name or None,
            "reward": self.reward,
            "next_state": self._observation(self.next_state),
            "terminated": self.terminated,
            "truncated": self.truncated,
            "bootstrap": self.bootstrap,
            "end": self.end,
            "join": self.join,
            "propensity": record.propensity,
            "propensity_kind": record.propensity_kind,
            "log_propensity": self.log_propensity,
            "propensity_reason": record.propensity_reason,
            **self._drawn_from(),
            **({} if self.steps is None else self.steps.plain()),
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
            "state_reset": record.state_reset,
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
        return {name: finite(value) for name, value in values.items()}

    def _drawn_from(self) -> dict[str, Any]:
        """What the action was drawn from: choices and their masks, or a point, its box and its draw."""
        record, space = self.record, self.spec.space
        if space.continuous:
            target = floats(record.target)
            return {
                "target": {"mean": target[: space.coordinates], "std": target[space.coordinates :]},
                "box": _box(self.mask),
                "next_box": _box(self.next_mask),
                "sigma": floats(record.sigma) or None,
                "raw_action": floats(record.raw_action),
                "raw_log_prob": record.raw_log_prob,
                "at_bound": list(record.at_bound),
                "transform": record.transform,
                "bounds": _box(record.bounds),
            }
        return {
            "behaviour": space.by_factor(floats(record.behaviour)),
            "target": space.by_factor(floats(record.target)),
            "mask": space.by_factor(list(self.mask)),
            "next_mask": space.by_factor(list(self.next_mask)) if self.next_mask else None,
        }

    def _observation(self, raw: bytes) -> Any:
        return np.frombuffer(raw, self.spec.dtype).reshape(self.spec.shape).tolist() if raw else None


def _box(raw: bytes) -> dict[str, Any] | None:
    """A box as requests and answers write it."""
    ends = floats(raw)
    return {"low": ends[: len(ends) // 2], "high": ends[len(ends) // 2 :]} if ends else None


def _check_sizes(record: Record, state: bytes, spec: Spec) -> None:
    dtype = np.dtype(record.dtype)
    if dtype.kind not in "fiub" or min(record.shape, default=0) < 1:
        raise ValueError(f"no observation has dtype {dtype} and shape {record.shape}")
    expected = math.prod(record.shape) * dtype.itemsize
    if len(state) != expected:
        raise ValueError(f"a state of {len(state)} bytes, {expected} expected")
    spec.space.check(record.target, record.behaviour, record.proposed)
    row = FLOAT * spec.space.coordinates
    sizes = {"raw_action": (row,), "sigma": (0, row), "bounds": (0, 2 * row)}
    for name, allowed in sizes.items():
        if len(getattr(record, name)) not in allowed:
            raise ValueError(f"{name} and action differ in length")
    if len(record.at_bound) != spec.space.coordinates:
        raise ValueError("at_bound and action differ in length")
