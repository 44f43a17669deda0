"""A recorded decision as people read it: the whole record, where it stands in the join, and why. Pure.

Also `replay`: draw again from what was recorded, and get the same action and propensity, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from policies.draw import draw, uniforms
from policies.explore import Behaviour, behave
from policies.heads import target
from policies.types import HeadKind
from service.decision import Record


class Recorded(Protocol):
    """What a replay needs of a stored decision."""

    @property
    def id(self) -> str: ...
    @property
    def mask(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Replayed:
    action: int
    explored: bool
    propensity: float


def replay(decision_id: str, mask: bytes, record: Record, draw_key: bytes) -> Replayed:
    """Draw again from the recorded head outputs, mask and ε. Same steps and arithmetic as the live pipeline."""
    allowed = np.frombuffer(mask, dtype=np.bool_)[None, :]
    outputs = _row(record.outputs, record.outputs_dtype)
    if outputs.size == 0:
        outputs = np.full(allowed.shape, np.nan)
    head: HeadKind = record.head  # type: ignore[assignment]
    behaviour: Behaviour = behave(
        target(outputs, head, record.temperature),
        allowed,
        np.array([record.epsilon]),
        np.array([max(record.fallback_action, 0)]),
    )
    drawn = draw(behaviour, uniforms(draw_key, [decision_id]))
    return Replayed(int(drawn.actions[0]), bool(drawn.explored[0]), float(drawn.propensity[0]))


def describe(stored: Any, record: Record) -> dict[str, Any]:
    """Describe a stored decision (`StoredDecision`, see redis_streams.py) with its decoded record."""
    state = np.frombuffer(stored.state, dtype=record.dtype).reshape(record.shape)
    return {
        "decision_id": stored.id,
        "policy": record.policy,
        "at_ms": stored.at_ms,
        "key": record.key,
        "episode": stored.episode or None,
        "step": None if stored.step < 0 else stored.step,
        "state": state.tolist(),
        "context": record.context,
        "assigned_version": record.assigned_version,
        "version": record.version,
        "digest": record.digest,
        "role": record.role,
        "generation": record.generation,
        "weight": record.weight,
        "switched": record.switched,
        "action": stored.action,
        "action_name": record.action_name,
        "propensity": record.propensity,
        "propensity_kind": record.propensity_kind,
        "propensity_reason": record.propensity_reason,
        "explored": record.explored,
        "epsilon": record.epsilon,
        "fallback": record.fallback,
        "why": _why(stored, record),
        "traceparent": record.traceparent,
        "ledger": {"producer": stored.producer, "epoch": stored.epoch, "seq": stored.seq},
    }


def _why(stored: Any, record: Record) -> dict[str, Any]:
    return {
        "head": record.head,
        "temperature": record.temperature,
        "outputs": _numbers(_row(record.outputs, record.outputs_dtype)[0]),
        "target": _row(record.target, "<f8")[0].tolist(),
        "behaviour": _row(record.behaviour, "<f8")[0].tolist(),
        "mask": [bool(byte) for byte in stored.mask],
        "masked_mass": record.masked_mass,
        "proposed": record.proposed,
        "overridden": record.overridden,
        "rules": list(record.rules),
        "key_id": record.key_id,
    }


def _row(raw: bytes, dtype: str) -> npt.NDArray[np.floating]:
    return np.frombuffer(raw, dtype=dtype)[None, :]


def _numbers(values: npt.NDArray[np.floating]) -> list[float | None]:
    """JSON has no NaN: what the network answered with it is shown as null."""
    return [float(value) if np.isfinite(value) else None for value in values]
