"""What is kept of a decision and of a reward: the event structs, their codec and schema version. Pure.

Duty: one place that says, byte for byte, what travels from `/act` and `/reward` through the spool to the join in
Redis and on to trainers. It knows nothing of SQLite, Redis or HTTP.
Strategy: an event is a msgpack array whose head is what the join script reads (`service/join_script/` unpacks it by
position), and whose element `record` is a msgpack map that the join carries along unread. Arrays travel as raw
little-endian bytes. Lua's cmsgpack, as Redis and Valkey have it, knows no `bin` type, so bytes are written as `str`.
Promise: a reader of this schema version reads all later minor additions (new record fields have defaults).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntFlag
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from policies.types import PropensityKind, WireAction

SCHEMA_VERSION = 1


class RewardFlags(IntFlag):
    """Bits of `RewardEvent.flags`; `service/join_script/` tests the same bits."""

    NONE = 0
    TERMINATED = 1
    TRUNCATED = 2
    FINAL = 4
    NOT_EXECUTED = 8


class DecisionFlags(IntFlag):
    """Bits of `DecisionEvent.flags`."""

    NONE = 0
    SWITCHED = 1  # another version decided the step before


class DecisionEvent(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One decision on its way to the join."""

    id: str
    episode: str  # "" when the caller named none
    step: int  # -1 when the caller named none
    due_ms: int  # event time at which the reward window closes
    at_ms: int  # event time of the decision
    action: str  # as `action_text` writes it
    state: bytes  # the observation, little-endian, dtype and shape in `record`
    mask: bytes  # one byte per choice, 1 allowed, factors side by side; or the box: float64 low and then high
    record: bytes  # msgpack of `Record`
    log_propensity: str = ""  # repr of the log of the executed action's probability or density; "" where not known
    flags: int = 0
    kind: str = "D"


class RewardEvent(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One accepted reward on its way to the join."""

    id: str  # the decision's
    reward_id: str  # "" when the caller named none
    digest: str  # of the canonical body: the same (id, reward_id) with another digest conflicts
    at_ms: int  # event time at which it was accepted: late or not is judged by this
    until_ms: int  # how long it waits for a decision that has not been shipped yet
    flags: int
    executed_action: str  # as `action_text` writes it; "" when the caller named none
    next_state: bytes  # b"" when the caller sent none
    reward: str  # repr of the float, so that no reader rounds it
    record: bytes  # msgpack of `RewardRecord`
    kind: str = "R"


class EpisodeEvent(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One accepted reward of a whole episode: it goes to the episode's last decision."""

    episode: str
    reward_id: str  # "" when the caller named none
    digest: str  # as `RewardEvent.digest`, by (episode, reward_id)
    at_ms: int  # event time at which it was accepted; the episode has ended by then
    until_ms: int
    flags: int  # terminated or truncated
    reward: str
    record: bytes  # msgpack of `RewardRecord`
    kind: str = "E"


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """All that is known about one decision besides the head of its event.

    `outputs` is what the network returned for this state, in `outputs_dtype`. `target` and `behaviour` are
    little-endian float64 arrays: over choices one element for each, factors side by side (each factor's marginal);
    over a box `target` is the raw action's means and then deviations, and `behaviour` is empty: the box (`mask`),
    `sigma` and ε say the rest.
    """

    policy: str
    assigned_version: str
    version: str  # the one that decided
    digest: str  # content digest of `version`
    role: str
    generation: int
    dtype: str  # of the observation, numpy notation: "<f4"
    shape: tuple[int, ...]
    head: str
    outputs_dtype: str
    outputs: bytes  # what the network returned for this state
    target: bytes  # the version's distribution, before mask and exploration
    behaviour: bytes  # what the action was drawn from
    epsilon: float  # in force for this row
    explored: bool
    proposed: WireAction  # what the version would have done without rules
    action_name: str | list[str] | None  # points have none
    propensity: float | None  # null where it is no probability: then log_propensity is the number, or there is a reason
    key_id: int  # whose draw key made the draw
    temperature: float | None = None
    propensity_kind: PropensityKind = "mass"
    propensity_reason: str | None = None
    overridden: bool = False
    rules: tuple[str, ...] = ()
    masked_mass: float = 0.0
    fallback: str | None = None  # the reason, when the fallback answered
    fallback_action: WireAction | None = None  # what the fallback was, used or not
    weight: float = 1.0  # routing weight at the pin
    switched: bool = False
    key: str | None = None
    context: dict[str, object] | None = None
    traceparent: str | None = None
    action_kind: str = "discrete"
    nvec: tuple[int, ...] = ()  # sizes of the factors, multi_discrete only
    state_reset: bool = False  # a recurrent version's memory did not fit the step, and was started anew
    log_propensity: float | None = None  # continuous only, as all that follows
    transform: str = "none"  # raw action to executed one
    bounds: bytes = b""  # the action space's own low and then high, float64
    sigma: bytes = b""  # deviation of the exploring part, float64 [D]; empty: there was none
    raw_action: bytes = b""  # the draw before squash and projection, float64 [D]
    raw_log_prob: float | None = None  # its log-density under the part that drew it
    at_bound: tuple[int, ...] = ()  # for each coordinate: -1 at the low end of the box, 1 at the high end, 0 between
    exploring: bytes = b""  # choices only: weights of the exploring part, float64, as the mask; empty: uniform over it
    joint_mask: bytes = b""  # where rules spoke of tuples of choices: one byte for each, the last factor fastest
    frozen: bool = False  # a stochastic head's mode was taken instead of a sample
    stand_in: str | None = None  # why the baseline decided in place of the assigned version
    rules_digest: str = ""  # of the `safety.yaml` in force; empty: there was none
    monitored: tuple[str, ...] = ()  # rules in monitor mode that the executed action breaks
    window: str = ""  # the budget's window that an explored decision is charged to
    price: float = 0.0  # what it costs of the regret budget
    pinned: int = 0  # generation of the control state in which the episode was assigned; 0: this decision's
    slow: bool = False  # the network took longer than its version's latency budget
    v: int = SCHEMA_VERSION


class RewardRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a reward brought along besides the head of its event."""

    metrics: dict[str, float] | None = None
    traceparent: str | None = None
    sent: float | None = None  # what the caller sent, where the policy's expression made another number of it
    v: int = SCHEMA_VERSION


Event = DecisionEvent | RewardEvent | EpisodeEvent


class Shared(NamedTuple):
    """What the records of decisions have in common, encoded once: so many fields of `Record`, and their bytes."""

    fields: int
    body: bytes


_encoder = msgspec.msgpack.Encoder()
_record = msgspec.msgpack.Decoder(Record)
_reward_record = msgspec.msgpack.Decoder(RewardRecord)
_events = msgspec.msgpack.Decoder(list[list[msgspec.Raw]])
_text = msgspec.msgpack.Decoder(str)
_scalar = msgspec.msgpack.Decoder(int | str)
_KINDS: dict[str, type[Event]] = {"D": DecisionEvent, "R": RewardEvent, "E": EpisodeEvent}
_DEFAULTS = {
    field.name: field.default for field in msgspec.structs.fields(Record) if field.default is not msgspec.NODEFAULT
}
_DECISION = _encoder.encode("D")  # how a decision event ends


def action_text(action: Sequence[float]) -> str:
    """Write an action so that equal ones have equal texts: "3", "1,0", "0.5,-0.25"; floats are not rounded."""
    return ",".join(map(repr, action))


def read_action(text: str) -> tuple[float, ...]:
    """Read what `action_text` wrote: integers for choices, floats for points."""
    return tuple(int(part) if part.lstrip("-").isdigit() else float(part) for part in text.split(","))


def encode_events(events: list[Event]) -> bytes:
    """Encode events that were recorded together as one blob: a spool row, and one argument of the join script."""
    return _encoder.encode([_columns(event) for event in events])


def decode_events(blob: bytes) -> list[Event]:
    """Read a blob back, whole: for tools and tests."""
    return [_event(columns) for columns in _events.decode(blob)]


def holds_decisions(blob: bytes) -> bool:
    """Whether the last event of a blob is a decision. Decisions and rewards are never recorded together."""
    return blob.endswith(_DECISION)


def decode_decisions(blob: bytes) -> list[tuple[str, bytes, bytes]]:
    """Read action, mask and record of each decision in a blob, and nothing else. Raises msgspec.DecodeError."""
    return [
        (_text.decode(columns[5]), _bytes(columns[7]), _bytes(columns[8]))
        for columns in _events.decode(blob)
        if _text.decode(columns[-1]) == "D"
    ]


def _columns(event: Event) -> tuple[object, ...]:
    return tuple(_raw(value) if isinstance(value, bytes) else value for value in msgspec.structs.astuple(event))


def _raw(value: bytes) -> msgspec.Raw:
    """Bytes as msgpack `str`, which need not be UTF-8 for Lua."""
    return msgspec.Raw(_str_head(len(value)) + value)


def _str_head(size: int) -> bytes:
    if size < 32:
        return bytes([0xA0 | size])
    if size < 1 << 8:
        return b"\xd9" + size.to_bytes(1, "big")
    if size < 1 << 16:
        return b"\xda" + size.to_bytes(2, "big")
    return b"\xdb" + size.to_bytes(4, "big")


def _bytes(raw: msgspec.Raw) -> bytes:
    whole = bytes(raw)
    return whole[{0xD9: 2, 0xDA: 3, 0xDB: 5}.get(whole[0], 1) :]


def _event(columns: list[msgspec.Raw]) -> Event:
    kind: type[Event] = _KINDS[_text.decode(columns[-1])]
    fields = msgspec.structs.fields(kind)
    values = [
        _bytes(raw) if field.type is bytes else _scalar.decode(raw) for field, raw in zip(fields, columns, strict=True)
    ]
    return kind(*values)  # type: ignore[arg-type]


def encode_record(record: Record | RewardRecord) -> bytes:
    return _encoder.encode(record)


def shared(fields: Mapping[str, object]) -> Shared:
    """Encode fields of `Record` that many records have in common; those with their defaults are left out."""
    return Shared(*_split({k: v for k, v in fields.items() if k not in _DEFAULTS or v != _DEFAULTS[k]}))


def record_of(common: Shared, own: Mapping[str, object]) -> msgspec.Raw:
    """Encode a record whose fields are these and no others, as an event holds it.

    It reads as what `encode_record` makes of the same fields; their order differs.
    """
    count, body = _split(own)
    size = 3 + len(common.body) + len(body)
    fields = (common.fields + count).to_bytes(2, "big")
    return msgspec.Raw(b"".join((_str_head(size), b"\xde", fields, common.body, body)))


def _split(fields: Mapping[str, object]) -> tuple[int, bytes]:
    """The number of fields, and their msgpack without the map's head."""
    return len(fields), _encoder.encode(fields)[1 if len(fields) < 16 else 3 :]


def encode_columns(events: list[tuple[object, ...]]) -> bytes:
    """As `encode_events`, of `DecisionEvent`s as tuples, their bytes by `raws` and `record_of`."""
    return _encoder.encode(events)


def raws(rows: npt.NDArray[np.generic]) -> list[msgspec.Raw]:
    """Each row of an array [B, …] as its bytes, little-endian as numpy has them here, as an event holds bytes."""
    count = len(rows)
    size = rows.nbytes // count
    head = _str_head(size)
    if count == 1:
        return [msgspec.Raw(head + rows.tobytes())]
    whole = np.empty((count, len(head) + size), dtype=np.uint8)
    whole[:, : len(head)] = np.frombuffer(head, dtype=np.uint8)
    whole[:, len(head) :] = np.ascontiguousarray(rows).view(np.uint8).reshape(count, size)
    joined, stride = whole.tobytes(), len(head) + size
    return [msgspec.Raw(joined[start : start + stride]) for start in range(0, count * stride, stride)]


def decode_record(raw: bytes) -> Record:
    return _record.decode(raw)


def decode_reward_record(raw: bytes) -> RewardRecord:
    return _reward_record.decode(raw)
