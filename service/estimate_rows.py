"""Closed decisions as the estimators read them: what a transition and a shadow's score say of one step. Pure.

Duty: read an entry of `transitions` and one of a shadow's stream, and say for a step how likely its action was under
the version that is judged, without exploration, how likely under what it was drawn from, and what the log could not do.
It knows nothing of units, tallies or Redis. Points in a box are `estimate_points.py`'s.
Strategy: a version on its own rows follows from what was recorded: b = (1-ε)·π_M + ε·e gives π_M, factor by factor. A
shadow's part is its score's. Where rules spoke of tuples of choices only sums over tuples were recorded; what they do
not settle is not guessed.
Promise: a step either has true numbers that fit together, or no propensity, and then it counts as not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
import numpy as np

from policies.types import Bools, Floats, WireAction, columns
from service.decision import RewardFlags, read_action
from shadow.rows import Step

_TINY = 1e-9  # what subtracting leaves of nothing
_CLOSE = 1e-7  # how well two numbers of a record agree; `shadow.rows` allows 1e-6


class Record(msgspec.Struct, frozen=True):
    """What is read of a decision's record (`service.decision.Record`)."""

    version: str
    digest: str
    assigned_version: str
    dtype: str
    shape: tuple[int, ...]
    behaviour: bytes
    target: bytes
    epsilon: float
    propensity: float | None
    log_propensity: float | None = None
    propensity_kind: str = "mass"
    fallback: str | None = None
    action_kind: str = "discrete"
    nvec: tuple[int, ...] = ()
    switched: bool = False
    key: str | None = None
    exploring: bytes = b""
    joint_mask: bytes = b""
    transform: str = "none"
    bounds: bytes = b""
    sigma: bytes = b""


class Said(msgspec.Struct, frozen=True):
    """What is read of a score (`shadow.scores.Score`)."""

    decision_id: str
    digest: str
    share: float
    target: bytes
    proposed: WireAction
    probability: float | None = None
    log_probability: float | None = None
    agrees: bool = False

    @property
    def size(self) -> int:
        """What it takes of memory, about."""
        return 400 + len(self.target)


class Seen(NamedTuple):
    """One closed decision. stream_id: its entry's. reward: None where none came, or none counts."""

    stream_id: tuple[int, int]
    id: str
    episode: str
    step: int  # -1 where the caller named none
    at_ms: int
    action: tuple[float, ...]
    state: bytes  # empty where no model reads it
    mask: bytes
    record: Record
    reward: float | None
    quarantined: bool
    ended: bool  # its episode ended here, was cut by the caller, or is known to go on: it was not lost

    @property
    def size(self) -> int:
        """What it takes of memory, about."""
        record = self.record
        sizes = map(len, (self.state, self.mask, record.behaviour, record.target, record.exploring, record.joint_mask))
        return 1_000 + sum(sizes)


@dataclass(frozen=True, slots=True)
class Judging:
    """What steps are read with. worst: what a quarantined reward counts as. features: of a model; 0: there is none."""

    worst: float | None = None
    actions: int = 0
    features: int = 0


_record = msgspec.msgpack.Decoder(Record)
_said = msgspec.msgpack.Decoder(Said)


def seen(stream_id: bytes, fields: Mapping[bytes, bytes], with_state: bool) -> Seen:
    """Read an entry. Raises MsgspecError, KeyError or ValueError for one that cannot be read."""
    flags, join = int(fields.get(b"tf") or b"0"), fields[b"j"]
    reward = float(fields[b"r"]) if fields[b"r"] and join in (b"joined", b"defaulted") else None
    if reward is not None and not math.isfinite(reward):
        raise ValueError("a reward that is not finite")
    ends = int(RewardFlags.TERMINATED) | int(RewardFlags.TRUNCATED)
    return Seen(
        stream_id=entry_id(stream_id),
        id=fields[b"i"].decode(),
        episode=fields[b"ep"].decode(),
        step=int(fields[b"st"]),
        at_ms=int(fields[b"t"]),
        action=read_action(fields[b"a"].decode()),
        state=fields.get(b"s", b"") if with_state else b"",
        mask=fields[b"m"],
        record=_record.decode(fields[b"d"]),
        reward=reward,
        quarantined=join == b"quarantined",
        ended=fields[b"x"] != b"lost" or bool(flags & ends),
    )


def said(raw: bytes) -> Said:
    """Read a score. Raises MsgspecError."""
    return _said.decode(raw)


def entry_id(raw: bytes | str) -> tuple[int, int]:
    """An entry's id as two numbers, which compare as Redis compares."""
    ms, _, number = (raw.decode() if isinstance(raw, bytes) else raw).partition("-")
    return int(ms), int(number or 0)


def text_id(stream_id: tuple[int, int]) -> str:
    return f"{stream_id[0]}-{stream_id[1]}"


# -- what a version does on its own rows


def own_step(row: Seen, label: str, digest: str, judging: Judging) -> Step:
    """A live version's step: what it would do without exploration. A row that another decided has no propensity."""
    step = _plain(row, judging)
    if (row.record.version, row.record.digest) != (label, digest):
        return step
    if row.record.action_kind == "continuous":
        from service.estimate_points import own_point  # loads scipy

        return own_point(step, row)
    own = _Own.of(row)
    if own is None:
        return step
    target = own.probability
    if target is None or row.record.propensity is None or not 0.0 < row.record.propensity <= 1.0:
        return step
    known = replace(step, target=target, propensity=row.record.propensity)
    return _with_model(known, row, own.choices, own.behaviour, judging)


class _Own:
    """π_M of the version that decided. choices: float64 [N], by factor; behaviour: float64 [N], with exploration."""

    def __init__(self, row: Seen, behaviour: Floats, nvec: tuple[int, ...], exploring: Floats | None) -> None:
        self._row, self._nvec, self._exploring = row, nvec, exploring
        epsilon = row.record.epsilon
        self.behaviour, self.epsilon = behaviour, epsilon
        own = behaviour if exploring is None else (behaviour - epsilon * exploring) / (1.0 - epsilon)
        self.choices: Floats = np.where(own > _TINY, own, 0.0)

    @classmethod
    def of(cls, row: Seen) -> _Own | None:
        """None where ε is 1: then nothing is left of π_M in what was recorded; or where sizes do not fit."""
        record = row.record
        behaviour = np.frombuffer(record.behaviour, "<f8")
        nvec = record.nvec or (len(behaviour),)
        if sum(nvec) != len(behaviour) or len(nvec) != len(row.action) or not _fits(row.action, nvec):
            return None
        if record.epsilon <= 0.0:
            return cls(row, behaviour, nvec, None)
        if record.epsilon >= 1.0:
            return None
        if record.joint_mask:
            joint = _exploring(record, record.joint_mask, (math.prod(nvec),))
            exploring = None if joint is None else _marginals(joint, nvec)
        else:
            exploring = _exploring(record, row.mask, nvec)
        return None if exploring is None else cls(row, behaviour, nvec, exploring)

    @property
    def probability(self) -> float | None:
        """Of the executed action."""
        record, row = self._row.record, self._row
        if self._exploring is None:
            return record.propensity
        if record.propensity is None:
            return None
        weights = self._exploring if not record.joint_mask else None
        chance = _product(weights, row.action, self._nvec) if weights is not None else _joint_chance(row, self._nvec)
        mass = (record.propensity - self.epsilon * chance) / (1.0 - self.epsilon)
        return min(max(mass, 0.0), 1.0) if mass > _TINY else 0.0

    @property
    def wanted(self) -> tuple[int, ...]:
        """What it would do: each factor's most probable choice, the lowest of equals."""
        return _best(self.choices, self._nvec)

    def covers(self, target: Floats) -> float:
        """Mass of another version's distribution, by factor, on what this one could have done."""
        sure = _mass_on(target, self.choices > 0.0, self._nvec)
        if self._exploring is None:
            return sure
        explored = self._exploring > 0.0
        return (
            sure
            + _mass_on(target, explored, self._nvec)
            - _mass_on(target, explored & (self.choices > 0.0), self._nvec)
        )


def _exploring(record: Record, mask: bytes, nvec: tuple[int, ...]) -> Floats | None:
    """What the exploring part draws from: in proportion to the recorded weights within the mask, or uniformly."""
    allowed = np.frombuffer(mask, np.uint8) > 0
    weights = np.frombuffer(record.exploring, "<f8") if record.exploring else np.ones(len(allowed))
    if len(allowed) != sum(nvec) or len(weights) != len(allowed):
        return None
    found = weights * allowed
    for part in columns(nvec):
        mass = found[part].sum()
        if not mass > 0.0:
            return None
        found[part] /= mass
    return found


def _joint_chance(row: Seen, nvec: tuple[int, ...]) -> float:
    """What exploring over tuples gives the executed one."""
    weights = _exploring(row.record, row.record.joint_mask, (math.prod(nvec),))
    return 0.0 if weights is None else float(weights[_index(row.action, nvec)])


# -- what a shadow would have done


def shadow_step(row: Seen, score: Said | None, champion: tuple[str, str], judging: Judging) -> Step:
    """A shadow's step, judged by its score. champion: label and digest, whom disagreements are counted against."""
    step = _plain(row, judging)
    if score is None:
        return step
    if row.record.action_kind == "continuous":
        from service.estimate_points import shadow_point

        return shadow_point(step, row, score, champion)
    behaviour, target = np.frombuffer(row.record.behaviour, "<f8"), np.frombuffer(score.target, "<f8")
    nvec, propensity = row.record.nvec or (len(behaviour),), row.record.propensity
    if len(target) != len(behaviour) or sum(nvec) != len(target) or not _fits(row.action, nvec):
        return step
    if score.probability is None or propensity is None or not 0.0 < propensity <= 1.0:
        return step
    own = _Own.of(row)
    unsupported = _unsupported(row, target, own, nvec)
    if unsupported is None:
        return step
    known = replace(step, target=min(score.probability, 1.0), propensity=propensity, unsupported=unsupported)
    if own is not None and (row.record.version, row.record.digest) == champion and target.any():
        wanted = _best(target, nvec)
        disagrees = wanted != own.wanted
        known = replace(known, disagrees=disagrees, matched=disagrees and row.action == wanted)
    return _with_model(known, row, target, behaviour, judging)


def _unsupported(row: Seen, target: Floats, own: _Own | None, nvec: tuple[int, ...]) -> float | None:
    """Mass of the target where the log could not go; None where what was recorded does not tell."""
    behaviour, record = np.frombuffer(row.record.behaviour, "<f8"), row.record
    if record.joint_mask and len(nvec) > 1:
        return _unsupported_jointly(row, target, behaviour, nvec)
    # Where ε is 1, as far as anything is known, there is the exploring part alone.
    lost = 1.0 - (_mass_on(target, behaviour > _TINY, nvec) if own is None else own.covers(target))
    return min(lost, 1.0) if lost > _TINY else 0.0


def _unsupported_jointly(row: Seen, target: Floats, behaviour: Floats, nvec: tuple[int, ...]) -> float | None:
    """Under a mask of tuples: what exploration covers is supported; else a sure target must be one tuple that is."""
    if row.record.epsilon > 0.0:
        joint = np.frombuffer(row.record.joint_mask, np.uint8) > 0
        weights = _exploring(row.record, row.record.joint_mask, (math.prod(nvec),))
        if weights is not None and bool((weights[joint] > 0.0).all()) and target.any():
            return 0.0
    wanted = _best(target, nvec)
    if _product(target, wanted, nvec) < 1.0 - _TINY:
        return None
    if wanted == row.action:
        return 0.0
    return 1.0 if _product(behaviour, wanted, nvec) <= _TINY else None


# -- common to both


def _plain(row: Seen, judging: Judging) -> Step:
    """What every step has: a place, a reward, and no propensity yet."""
    reward = judging.worst if row.quarantined else row.reward
    return Step(row.step, 0.0, None, reward, switched=row.record.switched)


def _with_model(step: Step, row: Seen, target: Floats, behaviour: Floats, judging: Judging) -> Step:
    """Add what a model reads. A row that does not fit it is not known: columns of a batch are alike."""
    if not judging.features:
        return step
    features = np.frombuffer(row.state, row.record.dtype).astype(np.float64) if row.state else np.empty(0)
    action, told = int(row.action[0]), _whole(target, behaviour)
    if told is None or len(told) != judging.actions or len(features) != judging.features or len(row.action) != 1:
        return replace(step, propensity=None)
    pairs = ((told[action], step.target), (behaviour[action], step.propensity or 0.0))
    if not all(abs(one - two) <= _CLOSE for one, two in pairs) or not np.isfinite(features).all():
        return replace(step, propensity=None)
    return replace(step, action=action, targets=told, behaviours=behaviour, features=features)


def _whole(target: Floats, behaviour: Floats) -> Floats | None:
    """A target that sums to one: what a version that refuses would not do is done where the log could not go."""
    missing = 1.0 - float(target.sum())
    if abs(missing) <= _CLOSE:
        return target
    nowhere = np.flatnonzero(behaviour == 0.0)
    if missing < 0.0 or not len(nowhere):
        return None
    filled = target.copy()
    filled[nowhere[0]] += missing
    return filled


def _fits(action: tuple[float, ...], nvec: tuple[int, ...]) -> bool:
    return len(action) == len(nvec) and all(0 <= a < n for a, n in zip(action, nvec, strict=True))


def _product(weights: Floats, action: tuple[float, ...], nvec: tuple[int, ...]) -> float:
    return math.prod(float(weights[part][int(a)]) for a, part in zip(action, columns(nvec), strict=True))


def _mass_on(target: Floats, where: Bools, nvec: tuple[int, ...]) -> float:
    return math.prod(float(target[part][where[part]].sum()) for part in columns(nvec))


def _best(weights: Floats, nvec: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(weights[part].argmax()) for part in columns(nvec))


def _index(action: tuple[float, ...], nvec: tuple[int, ...]) -> int:
    found = 0
    for choice, n in zip(action, nvec, strict=True):
        found = found * n + int(choice)
    return found


def _marginals(joint: Floats, nvec: tuple[int, ...]) -> Floats:
    table = joint.reshape(nvec)
    others = [tuple(axis for axis in range(len(nvec)) if axis != factor) for factor in range(len(nvec))]
    return np.concatenate([table.sum(axis=axes) for axes in others])
