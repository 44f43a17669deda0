"""How a question comes and how its answer leaves: JSON, msgpack, or raw numbers behind a part in JSON.

    Content-Type               the body
    application/octet-stream   [JSON without the state] numbers
    application/msgpack        the JSON's fields, in msgpack
    anything else              JSON

Duty: choose by header, and read the headers that raw numbers need. It knows no policy: what it gives is asked to read
its state once the policy, and with it the observation, is known.
Strategy: each form gives the same two things, the fields and a function that reads the state; so the hot routes are the
same for all. `Inference-Header-Content-Length` is the Open Inference Protocol's (docs/decisions/0020).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple, get_args

from policies.errors import InvalidField, MissingField
from service import packed, wire
from service.body import Head
from service.states import Dtype, State, StateReader, States, Tensor, expect_count
from service.wire import ActBatchFields, ActFields

DTYPE: Final = "Surefoot-Dtype"
SHAPE: Final = "Surefoot-Shape"
JSON_LENGTH: Final = "Inference-Header-Content-Length"
MSGPACK: Final = b"application/msgpack"
RAW: Final = b"application/octet-stream"

_SHAPE = re.compile(rb"\d{1,9}( ?, ?\d{1,9}){0,31}")
_LENGTH = re.compile(rb"\d{1,18}")
# Registered, in use before that, and what libraries send.
_MSGPACK = frozenset([MSGPACK, b"application/vnd.msgpack", b"application/x-msgpack"])


# A question for one action: what it says beside its state, how the state is read, and of what.
Asked = tuple[ActFields, Callable[[StateReader, Any], State], Any]


class AskedBatch(NamedTuple):
    """A question for several. states: told the most that there may be."""

    fields: ActBatchFields
    states: Callable[[StateReader, int], States]


class Form(NamedTuple):
    """How bodies of one media type are read. Raises what `wire.decode_act` raises, and BadMsgpack."""

    act: Callable[[Head, bytes], Asked]
    act_batch: Callable[[Head, bytes], AskedBatch]


def form_of(head: Head) -> Form:
    """The form that a request's head announces. What is no other is taken for JSON, as from `curl -d`."""
    sent = head.headers.get(b"content-type")
    if sent is None:
        return _JSON
    return _FORMS.get(sent) or _FORMS.get(sent.split(b";", 1)[0].strip().lower(), _JSON)


def wants_msgpack(head: Head) -> bool:
    """Whether a request's `Accept` prefers an answer in msgpack to one in JSON. `*/*` and silence mean JSON."""
    sent = head.headers.get(b"accept")
    if sent is None or b"msgpack" not in sent:
        return False
    wanted = {name: quality for each in sent.lower().split(b",") for name, quality in [_preference(each)]}
    best = max((wanted.get(name, 0.0) for name in _MSGPACK), default=0.0)
    return best > 0.0 and best >= wanted.get(b"application/json", 0.0)


def _preference(text: bytes) -> tuple[bytes, float]:
    name, *parameters = (part.strip() for part in text.split(b";"))
    for parameter in parameters:
        if parameter.startswith(b"q="):
            try:
                return name, float(parameter[2:])
            except ValueError:
                return name, 0.0
    return name, 1.0


# -- JSON -------------------------------------------------------------------------------------------------------------


def _json_act(_: Head, body: bytes) -> Asked:
    request = wire.decode_act(body)
    return request, StateReader.read, request.state


def _json_batch(_: Head, body: bytes) -> AskedBatch:
    request = wire.decode_act_batch(body)

    def states(reader: StateReader, limit: int) -> States:
        expect_count(len(request.states), limit)
        return [reader.read(raw, f"states[{index}]") for index, raw in enumerate(request.states)]

    return AskedBatch(request, states)


# -- msgpack ----------------------------------------------------------------------------------------------------------


def _packed_act(_: Head, body: bytes) -> Asked:
    request = packed.decode_act(body)
    return request, StateReader.read_packed, request.state


def _packed_batch(_: Head, body: bytes) -> AskedBatch:
    request = packed.decode_act_batch(body)
    return AskedBatch(request, lambda reader, limit: reader.read_packed_rows(request.states, "states", limit))


# -- raw --------------------------------------------------------------------------------------------------------------


def _raw_act(head: Head, body: bytes) -> Asked:
    part, tensor = _split(head, body)
    return wire.decode_act_fields(part), _raw_state, tensor


def _raw_state(reader: StateReader, tensor: Tensor) -> State:
    return reader.array(tensor, "state", SHAPE)


def _raw_batch(head: Head, body: bytes) -> AskedBatch:
    part, tensor = _split(head, body)
    fields = wire.decode_act_batch_fields(part)
    return AskedBatch(fields, lambda reader, limit: reader.rows(tensor, "states", limit, SHAPE))


def _split(head: Head, body: bytes) -> tuple[bytes, Tensor]:
    """The JSON in front, `{}` where there is none, and the array behind it."""
    sent = head.headers.get(JSON_LENGTH.lower().encode()) or b"0"
    if not _LENGTH.fullmatch(sent) or (length := int(sent)) > len(body):
        detail = f"the length of the JSON in front must be a whole number, {len(body)} (that of the body) at most"
        raise InvalidField(detail, JSON_LENGTH)
    shape = tuple(map(int, _needed(head, SHAPE, _SHAPE, "whole numbers with commas between, as 84,84,4").split(b",")))
    return body[:length] or b"{}", Tensor(_dtype(head), shape, memoryview(body)[length:])


def _dtype(head: Head) -> Dtype:
    sent = head.headers.get(DTYPE.lower().encode())
    for dtype in get_args(Dtype):
        if sent == dtype.encode():
            return dtype  # type: ignore[no-any-return]
    detail = f"the numbers must be one of {', '.join(get_args(Dtype))}: little-endian, in numpy's notation"
    raise (MissingField if sent is None else InvalidField)(detail, DTYPE)


def _needed(head: Head, name: str, pattern: re.Pattern[bytes], what: str) -> bytes:
    sent = head.headers.get(name.lower().encode())
    if sent is None:
        raise MissingField(f"raw numbers need this header: {what}", name)
    if not pattern.fullmatch(sent):
        raise InvalidField(f"send {what}", name)
    return sent


_JSON: Final = Form(_json_act, _json_batch)
_FORMS: Final = {
    b"application/json": _JSON,
    RAW: Form(_raw_act, _raw_batch),
    **dict.fromkeys(_MSGPACK, Form(_packed_act, _packed_batch)),
}
