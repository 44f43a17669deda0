"""The `state` of a request, as JSON, to an observation of the policy's shape. Pure.

A decoder is built once for each policy; complaints name the element as the caller wrote it: `state.cpu`, `state[2]`.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from policies.errors import InvalidField, SurefootError
from policies.types import ObservationSpec
from service.wire import complaint


class StateReader:
    """Reads observations of one policy."""

    def __init__(self, spec: ObservationSpec) -> None:
        self._spec = spec
        nested: Any = float
        for _ in spec.shape:
            nested = list[nested]
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(nested | dict[str, float])

    def read(self, raw: msgspec.Raw, where: str = "state") -> list[Any]:
        """Give the observation as nested lists of the spec's shape.

        Raises InvalidField, MissingField or UnknownField, naming the element below `where`.
        """
        try:
            state = self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            raise self._pinpoint(raw, error, where) from None
        if isinstance(state, dict):
            try:
                return self._spec.order(state)
            except SurefootError as error:
                raise _moved(error, where) from None
        self._check_shape(state, where)
        return state  # type: ignore[no-any-return]

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

    def _pinpoint(self, raw: msgspec.Raw, error: msgspec.ValidationError, where: str) -> SurefootError:
        """Name the feature: for a value of an object, msgspec's own path says only that there is one."""
        try:
            features = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        except msgspec.ValidationError:
            return complaint(error, where)
        for name, value in features.items():
            try:
                msgspec.json.decode(value, type=float)
            except msgspec.ValidationError as wrong:
                return complaint(wrong, f"{where}.{name}")
        return complaint(error, where)


def _moved(error: SurefootError, where: str) -> SurefootError:
    """The same error, its field below `where` instead of `state`."""
    return type(error)(error.detail, where + (error.field or "").removeprefix("state"))
