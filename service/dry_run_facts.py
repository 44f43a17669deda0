"""Recorded decisions as a dry run reads them, and the versions that made them. Pure.

Duty: from a record to the `Group` that `judge.py` is asked about. It knows no rules.
Strategy: a version that is no longer loaded has left its head and its outputs in the record; what training had seen is
not there, so it is judged by the champion's. A decision whose spaces are not the policy's any more cannot be judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from policies.bundle import PolicyBundle
from policies.types import TransformKind
from service.decision import Record, read_action
from service.plan import Group, LoadedVersion, Plan, Row

Order = tuple[int, str, int, int]  # event time, then lane and place in it


@dataclass(frozen=True, slots=True)
class Seen:
    """A recorded decision, as far as rules are about it."""

    id: str
    order: Order
    action: tuple[float, ...]
    state: bytes
    dtype: str
    shape: tuple[int, ...]
    version: str
    digest: str
    kind: str
    head: str
    transform: str
    temperature: float | None
    outputs: bytes
    outputs_dtype: str
    explored: bool
    fallback: bool
    stood_in: bool
    key: str | None
    context: dict[str, object] | None

    @property
    def at_ms(self) -> int:
        return self.order[0]

    @classmethod
    def of(cls, decision_id: str, order: Order, action: str, state: bytes, record: Record) -> Seen:
        """Take what a dry run reads; the rest of the record is let go of."""
        return cls(
            id=decision_id,
            order=order,
            action=read_action(action),
            state=state,
            dtype=record.dtype,
            shape=tuple(record.shape),
            version=record.version,
            digest=record.digest,
            kind=record.action_kind,
            head=record.head,
            transform=record.transform,
            temperature=record.temperature,
            outputs=record.outputs,
            outputs_dtype=record.outputs_dtype,
            explored=record.explored,
            fallback=record.fallback is not None,
            stood_in=record.stand_in is not None,
            key=record.key,
            context=record.context,
        )


class Versions:
    """The versions of a policy, by digest."""

    def __init__(self, plan: Plan) -> None:
        self._champion = plan.versions[plan.routes.champion]
        self._loaded = {version.bundle.digest: version for version in plan.versions.values()}
        self._others: dict[str, LoadedVersion] = {}

    def loaded(self, seen: Seen) -> bool:
        return seen.digest in self._loaded

    def of(self, seen: Seen) -> LoadedVersion:
        """The version that decided, or the champion in its likeness."""
        found = self._loaded.get(seen.digest) or self._others.get(seen.digest)
        if found is None:
            found = replace(self._champion, bundle=_like(seen, self._champion.bundle))
            self._others[seen.digest] = found
        return found

    def fits(self, seen: Seen) -> bool:
        """Whether a decision is one of the policy's spaces as they are now."""
        bundle = self._champion.bundle
        return (
            seen.kind == bundle.action.kind
            and seen.shape == bundle.observation.shape
            and bundle.action.validate(seen.action)
            and len(seen.outputs) // np.dtype(seen.outputs_dtype).itemsize in (0, self.of(seen).bundle.width)
        )


def _like(seen: Seen, champion: PolicyBundle) -> PolicyBundle:
    head: Any = seen.head
    transform: TransformKind = "unscale" if seen.transform == "unscale" else "none"
    return replace(
        champion,
        version=seen.version,
        digest=seen.digest,
        head=head,
        temperature=seen.temperature,
        transform=transform,
        interface=replace(champion.interface, head=head),
    )


def group_of(plan: Plan, version: LoadedVersion, decisions: Sequence[Seen]) -> Group:
    """Rebuild the group that one version decided; where its network had failed the outputs are NaN again."""
    bundle = version.bundle
    states = [np.frombuffer(each.state, dtype=each.dtype).reshape(each.shape) for each in decisions]
    nothing = np.full(bundle.width, np.nan)
    outputs = [np.frombuffer(each.outputs, each.outputs_dtype) if each.outputs else nothing for each in decisions]
    return Group(
        plan,
        version,
        index=list(range(len(decisions))),
        rows=[Row(state=[], key=each.key, context=each.context) for each in decisions],
        ids=[each.id for each in decisions],
        assignments=[],
        switched=[],
        states=np.array(states, dtype=bundle.observation.dtype),
        state_reset=[],
        outputs=np.array(outputs, dtype=np.float64),
    )
