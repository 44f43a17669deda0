"""Corrections for trainers: what a transition's reward should have been, where a default had left before it.

Duty: the entries of a policy's stream of corrections, and an iterator over them. How a stream is read is known to
`consumer.py` and `streams.py`.
Promise: **at least once**, in the order of the stream; nothing is ever dropped as a copy, for a decision may be
corrected more than once, and the last correction stands. Applying one twice does no harm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

import msgspec

from surefoot.consumer import Consumer, Feed, Terms
from surefoot.dedupe import Identity
from surefoot.errors import Unreadable
from surefoot.exchange import connect
from surefoot.group import Group, stream_key
from surefoot.progress import Stream
from surefoot.records import decode_reward
from surefoot.steps import number, whole
from surefoot.streams import ANSWER_S, DEFAULT_REDIS_URL, BlockingReader

SCHEMA_VERSION = 1

_STREAM = "correction"


@dataclass(frozen=True, slots=True)
class Correction:
    """The reward that should have stood. `(producer, epoch, seq)` and `decision_id` are those of the transition."""

    decision_id: str
    producer: str
    epoch: int
    seq: int
    reward: float  # NaN where there is none: voided or quarantined
    join: str  # joined | void | quarantined: what the transition should have been
    reward_id: str
    reward_at_ms: int  # event time at which the reward was accepted
    metrics: Mapping[str, float] | None
    why: str
    stream_id: bytes = field(repr=False)
    _acknowledge: Callable[[Correction], None] = field(repr=False, compare=False)

    @property
    def identity(self) -> Identity | None:
        """None: no correction is a copy of another."""
        return None

    @property
    def stream_ids(self) -> tuple[bytes, ...]:
        return (self.stream_id,)

    def ack(self) -> None:
        """Tell Redis that this correction is done with. Calling it again does no harm."""
        self._acknowledge(self)

    @classmethod
    def read(
        cls, stream_id: bytes, fields: Mapping[bytes, bytes], acknowledge: Callable[[Correction], None]
    ) -> Correction:
        """Read an entry. Raises Unreadable."""
        try:
            if whole(fields.get(b"v", b"1")) > SCHEMA_VERSION:
                raise Unreadable(f"correction {stream_id.decode()} has a newer schema version: upgrade surefoot")
            return cls(
                decision_id=fields[b"i"].decode(),
                producer=fields[b"p"].decode(),
                epoch=whole(fields[b"e"]),
                seq=whole(fields[b"q"]),
                reward=number(fields[b"r"].decode()),
                join=fields[b"j"].decode(),
                reward_id=fields[b"ri"].decode(),
                reward_at_ms=whole(fields[b"at"]),
                metrics=decode_reward(fields[b"rd"]).metrics if fields.get(b"rd") else None,
                why=fields.get(b"w", b"").decode(),
                stream_id=stream_id,
                _acknowledge=acknowledge,
            )
        except (KeyError, ValueError, msgspec.MsgspecError) as error:
            raise Unreadable(f"correction {stream_id.decode()} cannot be read: {error!r}") from error


class Corrections(BlockingReader[Correction]):
    """Iterator of corrections. Made by `corrections`. For use from one thread."""

    def __enter__(self) -> Corrections:
        return self


class CorrectionOptions(TypedDict, total=False):
    """Options of `corrections`, which mean what they do for `transitions`."""

    redis_url: str
    start: str
    claim_idle_s: float
    max_wait_s: float | None
    auto_ack: bool


def corrections(policy: str, group: str, consumer: str, **options: Unpack[CorrectionOptions]) -> Corrections:
    """Read a policy's corrections as a member of a consumer group, one by one.

    A decision whose reward did not come leaves with the policy's default. When its reward turns up after all, accepted
    in time, a correction tells so: find the transition by `decision_id` in what you keep, and change its reward.
    Options mean what they do for `transitions`; each correction is acknowledged when the next is asked for.
    """
    given: dict[str, Any] = dict(options)
    url, start = given.pop("redis_url", DEFAULT_REDIS_URL), given.pop("start", "0")
    terms = Terms(**given)
    reader: Corrections

    def read(stream_id: bytes, fields: Mapping[bytes, bytes]) -> Correction:
        return Correction.read(stream_id, fields, lambda correction: reader.ack(correction))

    def one_by_one(items: Sequence[Correction], copies: Sequence[bytes]) -> Sequence[Correction]:
        return items

    stream, at = Stream(stream_key(policy, _STREAM), group), Group(policy, group, consumer, start, _STREAM)
    member = Consumer(stream, at, Feed(read, one_by_one), terms, time.monotonic)
    reader = Corrections(member, connect(url, timeout_s=terms.block_s + ANSWER_S))
    return reader
