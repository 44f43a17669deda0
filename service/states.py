"""The `state` of a request, in JSON, in msgpack or as raw numbers, to an observation of the policy's shape. Pure.

    JSON      a list in the spec's order and shape, or an object by feature name
    msgpack   the same; or bytes: the numbers as they lie in memory, in the observation's dtype and shape; or a map
              {"dtype", "shape", "data"}, an array that says what it is
    raw       such an array

Strategy: decoders are built once for each policy. Arrays are views of the body's bytes: no number of theirs becomes a
Python object. Complaints name the element as the caller wrote it: `state.cpu`, `state[2]`, `state.shape`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, cast

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Raw, Struct

from policies.errors import BadJson, BadMsgpack, InvalidField, RequestError, SurefootError
from policies.types import ObservationSpec
from service.wire import complaint

Numbers = npt.NDArray[np.floating] | npt.NDArray[np.uint8]
State = list[Any] | Numbers  # one observation of the spec's shape
States = Sequence[State] | Numbers  # several: arrays with a leading axis

Dtype = Literal["<f4", "<f8", "|u1"]  # numpy's notation, as decisions are recorded with
_BIN = frozenset(b"\xc4\xc5\xc6")  # how bytes begin in msgpack
_MAP = frozenset([*range(0x80, 0x90), 0xDE, 0xDF])


class Tensor(Struct, forbid_unknown_fields=True, frozen=True):
    """Numbers as they lie in memory: little-endian, the last axis fastest."""

    dtype: Dtype
    shape: tuple[Annotated[int, Meta(ge=0)], ...]
    data: memoryview


class Format:
    """One of the two encodings of values, and what its faults are called."""

    def __init__(self, decoder: Callable[[Any], Any], decode: Callable[..., Any], fault: type[RequestError]) -> None:
        self.decoder = decoder  # a class: a type to a decoder
        self.decode = decode
        self.fault = fault


JSON = Format(msgspec.json.Decoder, msgspec.json.decode, BadJson)
MSGPACK = Format(msgspec.msgpack.Decoder, msgspec.msgpack.decode, BadMsgpack)
_tensor = msgspec.msgpack.Decoder(Tensor)
_map = msgspec.msgpack.Decoder(dict[str, Raw])
_bytes = msgspec.msgpack.Decoder(memoryview)
_list = msgspec.msgpack.Decoder(list[Raw])


class StateReader:
    """Reads observations of one policy."""

    def __init__(self, spec: ObservationSpec) -> None:
        self._spec = spec
        self._row_bytes = spec.size * np.dtype(spec.dtype).itemsize
        nested: Any = float
        for _ in spec.shape:
            nested = list[nested]
        self._json = JSON.decoder(nested | dict[str, float])
        self._msgpack = MSGPACK.decoder(nested | dict[str, float])

    def read(self, raw: Raw, where: str = "state") -> list[Any]:
        """Give an observation in JSON as nested lists of the spec's shape.

        Raises InvalidField, MissingField or UnknownField, naming the element below `where`.
        """
        return self._read(raw, where, self._json, JSON)

    def read_packed(self, raw: Raw, where: str = "state") -> State:
        """Give an observation in msgpack. Raises what `read` raises."""
        tensor = self._packed_tensor(raw, where)
        return self._read(raw, where, self._msgpack, MSGPACK) if tensor is None else self.array(tensor, where)

    def read_packed_rows(self, raw: Raw, where: str, limit: int) -> States:
        """Give at most `limit` observations in msgpack: a list of them, or one array with a leading axis."""
        tensor = self._packed_tensor(raw, where, batch=True)
        if tensor is not None:
            return self.rows(tensor, where, limit)
        try:
            states = _list.decode(raw)
        except msgspec.ValidationError as error:
            raise complaint(error, where) from None
        expect_count(len(states), limit)
        return [self.read_packed(state, f"{where}[{index}]") for index, state in enumerate(states)]

    def array(self, tensor: Tensor, where: str, shape_field: str = "") -> Numbers:
        """Give an array as one observation [*shape]: a view of its bytes. Raises InvalidField.

        shape_field: what a complaint about the shape names; `shape` below `where` if left out.
        """
        if tensor.shape != self._spec.shape:
            raise self._misshapen(tensor, shape_field or f"{where}.shape", "")
        return _view(tensor, where)

    def rows(self, tensor: Tensor, where: str, limit: int, shape_field: str = "") -> Numbers:
        """Give an array as at most `limit` observations [N, *shape]: a view of its bytes. Raises InvalidField."""
        if not tensor.shape or tensor.shape[1:] != self._spec.shape:
            raise self._misshapen(tensor, shape_field or f"{where}.shape", "N, ")
        expect_count(tensor.shape[0], limit)
        return _view(tensor, where)

    def _read(self, raw: Raw, where: str, decoder: Any, form: Format) -> list[Any]:
        try:
            state = decoder.decode(raw)
        except msgspec.ValidationError as error:
            raise self._pinpoint(raw, error, where, form) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:  # text inside that is not UTF-8
            raise form.fault(str(error), where) from None
        if isinstance(state, dict):
            try:
                return self._spec.order(state)
            except SurefootError as error:
                raise _moved(error, where) from None
        self._check_shape(state, where)
        return state  # type: ignore[no-any-return]

    def _packed_tensor(self, raw: Raw, where: str, *, batch: bool = False) -> Tensor | None:
        """The array that a value in msgpack is, if it is one; bare bytes are one observation, or a batch of them."""
        first = memoryview(raw)[0]
        if first in _BIN:
            data = _bytes.decode(raw)
            rows = (data.nbytes // self._row_bytes,) if batch else ()
            return Tensor(cast("Dtype", self._spec.wire_dtype), rows + self._spec.shape, data)
        if first not in _MAP:
            return None
        try:
            fields = _map.decode(raw)
            # A feature may be called `data`, but a feature is no bytes.
            if "data" not in fields or memoryview(fields["data"])[0] not in _BIN:
                return None
            return _tensor.decode(raw)
        except msgspec.ValidationError as error:
            raise complaint(error, where) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadMsgpack(str(error), where) from None

    def _misshapen(self, tensor: Tensor, field: str, leading: str) -> InvalidField:
        expected = leading + ", ".join(map(str, self._spec.shape))
        found = ", ".join(map(str, tensor.shape[:8])) + (", …" if len(tensor.shape) > 8 else "")
        return InvalidField(f"the state has shape [{found}], the policy expects [{expected}]", field)

    def _check_shape(self, state: list[Any], where: str) -> None:
        if len(self._spec.shape) == 1:
            found: tuple[int, ...] = (len(state),)
        else:
            try:
                found = np.shape(state)
            except ValueError:
                raise InvalidField(f"the state is ragged; its shape must be {list(self._spec.shape)}", where) from None
        if found != self._spec.shape:
            raise InvalidField(f"the state has shape {list(found)}, the policy expects {list(self._spec.shape)}", where)

    def _pinpoint(self, raw: Raw, error: msgspec.ValidationError, where: str, form: Format) -> SurefootError:
        """Name the feature: for a value of an object, msgspec's own path says only that there is one."""
        try:
            features = form.decode(raw, type=dict[str, Raw])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return complaint(error, where)
        for name, value in features.items():
            try:
                form.decode(value, type=float)
            except msgspec.ValidationError as wrong:
                return complaint(wrong, f"{where}.{name}")
        return complaint(error, where)


def expect_count(count: int, limit: int) -> None:
    """Refuse a batch that is empty or too large."""
    if not 1 <= count <= limit:
        raise InvalidField(f"there must be 1 to {limit} states, got {count}", "states")


def _view(tensor: Tensor, where: str) -> Numbers:
    dtype = np.dtype(tensor.dtype)
    takes = math.prod(tensor.shape) * dtype.itemsize
    if tensor.data.nbytes != takes:
        detail = f"{list(tensor.shape)} of {tensor.dtype} take {takes} bytes, there are {tensor.data.nbytes}"
        raise InvalidField(detail, where)
    return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)


def _moved(error: SurefootError, where: str) -> SurefootError:
    """The same error, its field below `where` instead of `state`."""
    return type(error)(error.detail, where + (error.field or "").removeprefix("state"))
