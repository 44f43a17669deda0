"""A recorded decision as people read it: the whole record, where it stands in the join, and why. Pure.

Also `replay`: draw again from what was recorded, and get the same action and propensity, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from policies.draw import draw, uniforms
from policies.explore import behave
from policies.heads import target
from policies.types import HeadKind, columns
from safety.joint import lift_target, to_indices, to_tuples
from service.decision import Record, read_action


class Recorded(Protocol):
    """What a replay needs of a stored decision."""

    @property
    def id(self) -> str: ...
    @property
    def mask(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Replayed:
    action: tuple[float, ...]
    explored: bool
    propensity: float | None
    log_propensity: float | None  # continuous only


def replay(decision_id: str, mask: bytes, record: Record, draw_key: bytes) -> Replayed:
    """Draw again from the recorded head outputs, mask and ε. Same steps and arithmetic as the live pipeline."""
    if record.action_kind == "continuous":
        return _replay_point(decision_id, mask, record, draw_key)
    nvec = record.nvec or (len(mask),)
    allowed = np.frombuffer(record.joint_mask or mask, dtype=np.bool_)[None, :]
    wanted = target(_outputs(record, sum(nvec)), _head(record), record.temperature, nvec)
    fallback = _fallback(record, len(nvec)).astype(np.int64)
    if record.joint_mask:
        wanted, fallback = lift_target(wanted), to_indices(fallback, nvec)
    behaviour = behave(
        wanted,
        allowed,
        np.array([record.epsilon]),
        fallback,
        np.frombuffer(record.exploring, dtype="<f8")[None, :] if record.exploring else None,
        np.array([record.frozen]),
    )
    drawn = draw(behaviour, uniforms(draw_key, [decision_id], 1 + len(wanted.nvec)))
    actions = to_tuples(drawn.actions[:, 0], nvec) if record.joint_mask else drawn.actions
    return Replayed(tuple(actions[0].tolist()), bool(drawn.explored[0]), float(drawn.propensity[0]), None)


def _replay_point(decision_id: str, box: bytes, record: Record, draw_key: bytes) -> Replayed:
    import policies.continuous as continuous  # loads scipy

    low, high = np.frombuffer(record.bounds, dtype="<f8").reshape(2, -1)
    ends = np.frombuffer(box, dtype="<f8").reshape(2, 1, -1)
    width = low.size * (1 if record.head == "action" else 2)
    kind: Any = record.transform
    behaviour = continuous.behave(
        continuous.gaussian(_outputs(record, width), _head(record)),
        continuous.Transform(kind, low, high),
        (ends[0], ends[1]),
        np.array([record.epsilon]),
        np.frombuffer(record.sigma, dtype="<f8") if record.sigma else None,
        np.clip(_fallback(record, low.size), low, high),
    )
    drawn = continuous.draw(behaviour, uniforms(draw_key, [decision_id], 1 + low.size))
    propensity, log_propensity = float(drawn.propensity[0]), float(drawn.log_propensity[0])
    known = propensity if np.isfinite(propensity) else None
    return Replayed(tuple(drawn.actions[0].tolist()), bool(drawn.explored[0]), known, log_propensity)


def _head(record: Record) -> HeadKind:
    return record.head  # type: ignore[return-value]


def _outputs(record: Record, width: int) -> npt.NDArray[np.floating]:
    """What the network returned, [1, width]; NaN where it failed."""
    outputs = _row(record.outputs, record.outputs_dtype)
    return outputs if outputs.size else np.full((1, width), np.nan)


def _fallback(record: Record, size: int) -> npt.NDArray[np.float64]:
    declared = np.zeros(size) if record.fallback_action is None else np.array(record.fallback_action, dtype=np.float64)
    return np.asarray(declared.reshape(1, size))


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
        "state_reset": record.state_reset,
        "action": wire_action(stored.action, record),
        "action_name": record.action_name,
        "propensity": record.propensity,
        "propensity_kind": record.propensity_kind,
        "log_propensity": record.log_propensity,
        "propensity_reason": record.propensity_reason,
        "explored": record.explored,
        "epsilon": record.epsilon,
        "fallback": record.fallback,
        "stand_in": record.stand_in,
        "why": _why(stored, record),
        "traceparent": record.traceparent,
        "ledger": {"producer": stored.producer, "epoch": stored.epoch, "seq": stored.seq},
    }


def _why(stored: Any, record: Record) -> dict[str, Any]:
    return {
        "head": record.head,
        "temperature": record.temperature,
        "outputs": _numbers(_row(record.outputs, record.outputs_dtype)[0]),
        **(_point(stored, record) if record.action_kind == "continuous" else _choice(stored, record)),
        "masked_mass": record.masked_mass,
        "proposed": record.proposed,
        "overridden": record.overridden,
        "rules": list(record.rules),
        "rules_digest": record.rules_digest or None,
        "monitored": list(record.monitored),
        "key_id": record.key_id,
    }


def _choice(stored: Any, record: Record) -> dict[str, Any]:
    return {
        "target": _factors(_row(record.target, "<f8")[0].tolist(), record),
        "behaviour": _factors(_row(record.behaviour, "<f8")[0].tolist(), record),
        "mask": _factors([bool(byte) for byte in stored.mask], record),
    }


def _factors(row: list[Any], record: Record) -> list[Any]:
    """A row as it is, or cut by factor."""
    return [row[part] for part in columns(record.nvec)] if record.nvec else row


def _point(stored: Any, record: Record) -> dict[str, Any]:
    low, high = np.frombuffer(stored.mask, dtype="<f8").reshape(2, -1)
    mean, std = _row(record.target, "<f8").reshape(2, -1)
    return {
        "transform": record.transform,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "low": _numbers(low),
        "high": _numbers(high),
        "sigma": np.frombuffer(record.sigma, dtype="<f8").tolist() or None,
        "raw_action": np.frombuffer(record.raw_action, dtype="<f8").tolist(),
        "raw_log_prob": record.raw_log_prob,
        "at_bound": list(record.at_bound),
    }


def wire_action(text: str, record: Record) -> Any:
    """A stored action as answers hold it: an index, or a list."""
    action = read_action(text)
    return action[0] if record.action_kind == "discrete" else list(action)


def _row(raw: bytes, dtype: str) -> npt.NDArray[np.floating]:
    return np.frombuffer(raw, dtype=dtype)[None, :]


def _numbers(values: npt.NDArray[np.floating]) -> list[float | None]:
    """JSON has no NaN: what the network answered with it is shown as null."""
    return [float(value) if np.isfinite(value) else None for value in values]
