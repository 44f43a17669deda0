"""Bodies in msgpack: the same structs as in JSON, with the same complaints, and what JSON cannot say refused. Pure.

Duty: bytes to requests whose `state` is still msgpack. Semantics live where those of JSON do.
Strategy: msgspec decodes into the structs of `wire.py`; fields that hold anything (`context`) or floats are then
walked, since msgpack has NaN, infinities, bytes, times and keys that are no strings.
Promise: what passes could have been written in JSON, so that nobody behind this file needs to know which it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from msgspec import Raw

from policies.errors import BadMsgpack, InvalidField, NotFinite
from service.wire import ActBatchFields, ActFields, ActRequest, AllowedBox, complaint

# Fields whose types let through what JSON has no word for.
_OPEN = ("context", "allowed_actions", "previous_action", "contexts", "previous_actions")


class PackedActBatch(ActBatchFields, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """An `ActBatchRequest` whose states may be one array."""

    states: Raw


_act = msgspec.msgpack.Decoder(ActRequest)
_act_batch = msgspec.msgpack.Decoder(PackedActBatch)
_encoder = msgspec.msgpack.Encoder()

F = TypeVar("F", bound=ActFields | ActBatchFields)


def decode_act(body: bytes) -> ActRequest:
    return _decode(_act, body)


def decode_act_batch(body: bytes) -> PackedActBatch:
    return _decode(_act_batch, body)


def repacked(answer: bytes) -> bytes:
    """An answer in JSON as msgpack, with the same fields and numbers."""
    return _encoder.encode(msgspec.json.decode(answer))


def _decode(decoder: msgspec.msgpack.Decoder[F], body: bytes) -> F:
    try:
        request = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise complaint(error) from None
    except RecursionError:
        raise BadMsgpack("the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadMsgpack(str(error)) from None
    for name in _OPEN:
        if (value := getattr(request, name, None)) is not None:
            _refuse_foreign(value, name)
    return request


def _refuse_foreign(value: Any, path: str) -> None:
    """Refuse what JSON cannot say, naming the element."""
    waiting = [(value, path)]  # and no recursion: the nesting is the caller's
    while waiting:
        value, path = waiting.pop()
        if isinstance(value, float):
            if not math.isfinite(value):
                raise NotFinite("NaN and Infinity are not accepted", path)
        elif isinstance(value, dict | list | AllowedBox):
            waiting += reversed([*_elements(value, path)])  # so that the first is named
        elif not (value is None or isinstance(value, str | int)):
            raise InvalidField(f"a {type(value).__name__} is not accepted: JSON has none", path)


def _elements(value: dict[Any, Any] | list[Any] | AllowedBox, path: str) -> Iterator[tuple[Any, str]]:
    if isinstance(value, AllowedBox):
        value = {"low": value.low, "high": value.high}
    if isinstance(value, list):
        yield from ((element, f"{path}[{index}]") for index, element in enumerate(value))
        return
    for name, element in value.items():
        if not isinstance(name, str):
            raise InvalidField("names must be strings", path)
        yield element, f"{path}.{name}"
