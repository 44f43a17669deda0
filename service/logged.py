"""What records of shipped decisions say of chance, as arrays. Pure.

Duty: read as little of a blob as the calibration monitor needs, and put decisions of one space into its columns.
Promise: what does not fit raises MsgspecError, ValueError or IndexError; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from policies.types import Floats
from safety.calibration_choices import Choices
from service.decision import decode_decisions, read_action

if TYPE_CHECKING:
    from safety.calibration_points import Points


class Space(msgspec.Struct, frozen=True):
    """What actions look like. sizes: (n,), the factors' sizes, or (D,) over a box."""

    continuous: bool
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.sizes))} {'coordinates' if self.continuous else 'choices'}"


class Logged(msgspec.Struct, frozen=True):
    """What a record (`service.decision.Record`) says of chance."""

    behaviour: bytes
    target: bytes
    epsilon: float
    explored: bool
    propensity: float | None
    action_kind: str = "discrete"
    nvec: tuple[int, ...] = ()
    fallback: str | None = None
    log_propensity: float | None = None
    transform: str = "none"
    bounds: bytes = b""
    sigma: bytes = b""
    raw_action: bytes = b""
    at_bound: tuple[int, ...] = ()


class Decided(NamedTuple):
    """One decision: its action as `action_text` writes it, its mask or box, its record."""

    action: str
    mask: bytes
    record: Logged

    @property
    def space(self) -> Space:
        record = self.record
        if record.action_kind == "continuous":
            return Space(True, (len(self.mask) // 16,))
        return Space(False, record.nvec or (len(record.behaviour) // 8,))


_logged = msgspec.msgpack.Decoder(Logged)


def decided(blob: bytes) -> list[Decided]:
    """Read the decisions of a blob."""
    return [Decided(action, mask, _logged.decode(record)) for action, mask, record in decode_decisions(blob)]


def choices(rows: Sequence[Decided], nvec: tuple[int, ...]) -> Choices:
    """Columns of decisions over choices."""
    records = [row.record for row in rows]
    return Choices(
        behaviour=_numbers([record.behaviour for record in records]).reshape(len(rows), sum(nvec)),
        actions=np.array([read_action(row.action) for row in rows], dtype=np.int64).reshape(len(rows), len(nvec)),
        epsilons=np.array([record.epsilon for record in records]),
        explored=np.array([record.explored for record in records]),
        propensities=np.array([record.propensity for record in records], dtype=np.float64),
        nvec=nvec,
    )


def points(rows: Sequence[Decided], size: int) -> Points:
    """Columns of decisions over a box of D sides, of versions with the same transform. None may be a fallback's."""
    from policies.continuous import Transform  # loads scipy: only with the first continuous policy
    from safety.calibration_points import Points

    records = [row.record for row in rows]
    low, high = np.frombuffer(records[0].bounds, "<f8").reshape(2, size)
    kind: Any = records[0].transform
    return Points(
        target=_numbers([record.target for record in records]).reshape(len(rows), 2 * size),
        boxes=_numbers([row.mask for row in rows]).reshape(len(rows), 2, size),
        sigmas=_numbers([record.sigma or bytes(8 * size) for record in records]).reshape(len(rows), size),
        raw_actions=_numbers([record.raw_action for record in records]).reshape(len(rows), size),
        at_bound=np.array([record.at_bound for record in records], dtype=np.int64).reshape(len(rows), size),
        epsilons=np.array([record.epsilon for record in records]),
        log_propensities=np.array([record.log_propensity for record in records], dtype=np.float64),
        explored=np.array([record.explored for record in records]),
        fallback=np.zeros(len(rows), dtype=np.bool_),
        transform=Transform(kind, low, high),
    )


def _numbers(parts: Sequence[bytes]) -> Floats:
    return np.frombuffer(b"".join(parts), "<f8")
