"""A settled group's rows, one by one: what is recorded of each and what its caller is answered. Pure.

Duty: one event and one answer for each row, of the same values. Order, refusals and what to do when nothing could be
settled are `record.py`'s.
Strategy: every array becomes Python values or bytes once for the group; what all records of a group have in common is
encoded once; a record's fields that have their defaults are not even looked at where no row of the group has others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from policies.draw import Drawn
from policies.route import Assignment
from policies.types import Box, Choices, Role
from safety.fallback import reason
from safety.joint import marginals
from safety.types import Constraint, FallbackReason
from service.decision import (
    SCHEMA_VERSION,
    DecisionFlags,
    Shared,
    action_text,
    raws,
    record_of,
    shared,
)
from service.plan import Row, Settled
from service.settled_points import Points, distribution, known, slices
from service.wire import ActResponse, Exploration, Safety

if TYPE_CHECKING:
    from policies.continuous import PointBehaviour

Own = dict[str, object]  # fields of a record
MOST_KINDS = 1024  # of what records of one plan have in common; episodes bring assignments of earlier ones along


class SettledRows:
    """The rows of one group."""

    def __init__(self, settled: Settled, at_ms: int, kid: int) -> None:
        """at_ms: event time of the decisions. kid: whose draw key drew them."""
        group, bundle = settled.group, settled.group.version.bundle
        self._settled = settled
        self._group = group
        self._plan = group.plan
        self._bundle = bundle
        self._at_ms = at_ms
        self._due_ms = at_ms + group.plan.window_ms
        self._kid = kid
        self._take_arrays(settled)
        space, declared = bundle.action, bundle.fallback
        self._actions = settled.actions.tolist()
        self._names, self._wire = space.labels(self._actions), space.wires(self._actions)
        proposed = settled.proposed.tolist()
        names, self._proposed = space.labels(proposed), space.wires(proposed)
        self._proposals = self._proposed if isinstance(space, Box) else names
        self._fallback_action = None if declared is None else space.wire(declared)
        self._texts = list(map(action_text, self._actions))
        constraint = settled.judged.constraint
        ruled = constraint.by_rule or constraint.replaced
        self._rules = constraint.rules_against_all(settled.proposed) if ruled else None
        self._monitored = constraint.monitors_against_all(settled.actions) if constraint.monitored else None
        self._points = None
        if not isinstance(settled.drawn, Drawn):
            self._points = Points(settled.drawn, cast("PointBehaviour", settled.behaviour), bundle)
        some = (self._exploring, self._joint, self._frozen, self._monitored)
        self._has_parts = any(some) or any(group.state_reset) or any(group.switched)
        self._common: tuple[Assignment | None, str | None, Shared] = (None, None, Shared(0, b""))
        self._explorations: dict[float, Exploration] = {}
        self._untouched: dict[object, Safety] = {}  # by the action that was proposed
        self._logs: dict[float, str] = {}

    def _take_arrays(self, settled: Settled) -> None:
        recorded = settled.judged.constraint.recorded()
        target, behaviour = settled.target.distribution, settled.behaviour.probabilities
        self._joint = None
        if isinstance(settled.judged.constraint, Constraint) and (factors := settled.judged.constraint.factors):
            self._joint = slices(recorded)
            recorded = marginals(recorded.astype(np.float64), factors) > 0.0
            target, behaviour = marginals(target, factors), marginals(behaviour, factors)
        outputs = settled.group.outputs
        self._states, self._masks = raws(settled.group.states), raws(recorded)
        self._outputs = [b""] * len(settled.passed) if outputs is None else slices(outputs)
        self._outputs_dtype = "<f8" if outputs is None else outputs.dtype.str
        self._targets, self._behaviours = slices(target), slices(behaviour)
        self._propensity = settled.drawn.propensity.tolist()
        self._explored = settled.drawn.explored.tolist()
        self._epsilon = settled.behaviour.epsilon.tolist()
        self._fallen = settled.behaviour.fallback.tolist()
        self._passed = settled.passed.tolist()
        self._masked = settled.masked_mass.tolist()
        self._exploring = None if settled.exploring is None else slices(settled.exploring)
        self._frozen = None if settled.frozen is None else settled.frozen.tolist()
        self._paid = settled.paid.tolist()

    def refused(self, i: int) -> bool:
        """Whether a row may not be answered: the fallback would be, and none is declared."""
        return self._bundle.fallback is None and (self._fallen[i] or not self._passed[i])

    def both(self, i: int) -> tuple[tuple[object, ...], ActResponse]:
        """The columns of a row's event, and its answer."""
        group = self._group
        row, assigned = group.rows[i], group.assignments[i]
        stand_in = group.stand_in[i] if group.stand_in else None
        rules = self._rules[i] if self._rules else ()
        passed = self._passed[i]
        propensity = known(self._propensity[i]) if passed else None
        points = self._points.of(i, passed) if self._points else None
        log_propensity = points["log_propensity"] if points else None
        fallback = self._fallback(i) if self._fallen[i] or not passed else None
        own: Own = {
            "outputs": self._outputs[i],
            "target": self._targets[i],
            "behaviour": self._behaviours[i],
            "epsilon": self._epsilon[i],
            "explored": self._explored[i],
            "proposed": self._proposed[i],
            "action_name": self._names[i],
            "propensity": propensity,
        }
        self._add_asked(own, row)
        self._add_rare(own, i, rules, fallback)
        if points:
            own |= points
        event = (
            group.ids[i],
            row.episode or "",
            -1 if row.step is None else row.step,
            self._due_ms,
            self._at_ms,
            self._texts[i],
            self._states[i],
            self._masks[i],
            record_of(self._shared(assigned, stand_in), own),
            self._log_text(propensity, log_propensity),
            int(DecisionFlags.SWITCHED) if group.switched[i] else 0,
            "D",
        )
        # By position as far as they are plain: of more than 15 keywords Python makes a dict, at more than all the rest.
        answer = ActResponse(
            group.ids[i],
            self._plan.policy,
            assigned.version,
            self._bundle.version,
            self._role(assigned.role),
            self._plan.generation,
            self._wire[i],
            self._names[i],
            propensity,
            None if passed else "check_failed",
            self._explored[i],
            exploration=self._exploration(self._epsilon[i]),
            safety=self._safety(i, rules, stand_in),
            fallback=fallback,
            logged=True,
            switched=group.switched[i],
            state_reset=group.state_reset[i],
            propensity_kind=points["propensity_kind"] if points else "mass",
            log_propensity=log_propensity,
            values=self._values(i) if row.include and "values" in row.include else None,
            distribution=distribution(self._settled, i) if row.include and "distribution" in row.include else None,
        )
        return event, answer

    def _add_asked(self, own: Own, row: Row) -> None:
        """What the caller said."""
        if row.key is not None:
            own["key"] = row.key
        if row.context is not None:
            own["context"] = row.context
        if row.traceparent is not None:
            own["traceparent"] = row.traceparent

    def _add_rare(self, own: Own, i: int, rules: tuple[str, ...], fallback: FallbackReason | None) -> None:
        """What most decisions have nothing of."""
        if rules:
            own["overridden"], own["rules"] = True, rules
        if fallback is not None:
            own["fallback"] = fallback
            if not self._passed[i]:
                own["propensity_reason"] = "check_failed"
        if self._masked[i]:
            own["masked_mass"] = self._masked[i]
        if self._explored[i]:
            own["window"], own["price"] = self._settled.windows, self._paid[i]
        if self._has_parts:
            self._add_parts(own, i)

    def _add_parts(self, own: Own, i: int) -> None:
        """What only some kinds of policies have, or rows among few."""
        if self._group.switched[i]:
            own["switched"] = True
        if self._monitored and self._monitored[i]:
            own["monitored"] = self._monitored[i]
        if self._group.state_reset[i]:
            own["state_reset"] = True
        if self._exploring:
            own["exploring"] = self._exploring[i]
        if self._joint:
            own["joint_mask"] = self._joint[i]
        if self._frozen and self._frozen[i]:
            own["frozen"] = True

    def _shared(self, assigned: Assignment, stand_in: str | None) -> Shared:
        """What the record has in common with those of the rows that were assigned alike."""
        last, last_stand_in, found = self._common
        if last is not assigned or last_stand_in != stand_in:
            found = self._find_shared(assigned, stand_in)
            self._common = assigned, stand_in, found
        return found

    def _find_shared(self, assigned: Assignment, stand_in: str | None) -> Shared:
        """What such rows have had in common before under this plan, or encode it."""
        known = self._plan.records
        slow = self._group.infer_s * 1000 > self._bundle.latency_budget_ms
        key = (
            self._bundle.version, self._bundle.digest, self._kid, assigned, stand_in, slow,
            self._settled.judged.rules_digest, self._outputs_dtype,
        )  # fmt: skip
        found = known.get(key)
        if found is None:
            if len(known) >= MOST_KINDS:
                known.clear()
            found = known[key] = self._encode_shared(assigned, stand_in, slow)
        return found

    def _encode_shared(self, assigned: Assignment, stand_in: str | None, slow: bool) -> Shared:
        bundle, space, generation = self._bundle, self._bundle.action, self._plan.generation
        fields: dict[str, object] = {
            "policy": self._plan.policy,
            "assigned_version": assigned.version,
            "version": bundle.version,
            "digest": bundle.digest,
            "role": self._role(assigned.role),
            "stand_in": stand_in,
            "generation": generation,
            "dtype": bundle.observation.wire_dtype,
            "shape": bundle.observation.shape,
            "head": bundle.head,
            "outputs_dtype": self._outputs_dtype,
            "key_id": self._kid,
            "temperature": bundle.temperature,
            "fallback_action": self._fallback_action,
            "weight": assigned.weight,
            "action_kind": space.kind,
            "nvec": space.nvec if isinstance(space, Choices) and space.factors else (),
            "rules_digest": self._settled.judged.rules_digest,
            "pinned": assigned.generation if assigned.generation != generation else 0,
            "slow": slow,
            "v": SCHEMA_VERSION,
        }
        return shared(fields)

    def _role(self, assigned: Role) -> Role:
        if self._group.stand_in is None:
            return assigned
        return "champion" if self._bundle.version == self._plan.routes.champion else "baseline"

    def _safety(self, i: int, rules: tuple[str, ...], stand_in: str | None) -> Safety:
        if rules or stand_in is not None or not isinstance(name := self._proposals[i], str):
            return Safety(bool(rules), cast(Any, self._proposals[i]), rules, stand_in)
        found = self._untouched.get(name)
        if found is None:
            found = self._untouched[name] = Safety(False, name, ())
        return found

    def _exploration(self, epsilon: float) -> Exploration:
        found = self._explorations.get(epsilon)
        if found is None:
            found = self._explorations[epsilon] = Exploration(epsilon, self._settled.left)
        return found

    def _log_text(self, propensity: float | None, log_propensity: float | None) -> str:
        """The log of the propensity as the event's head has it: "" where it is not known."""
        if log_propensity is not None:
            return repr(log_propensity)
        if not propensity:
            return ""
        found = self._logs.get(propensity)
        if found is None:
            found = self._logs[propensity] = repr(math.log(propensity))
        return found

    def _values(self, i: int) -> list[float] | None:
        """The network's outputs, where they are numbers that JSON can carry."""
        if self._settled.target.faulty[i]:
            return None
        return cast(list[float], cast(npt.NDArray[np.floating], self._group.outputs)[i].tolist())

    def _fallback(self, i: int) -> FallbackReason:
        if not self._passed[i]:
            return "check_failed"
        return reason(
            failure=self._settled.judged.denied[i] or self._group.failure,
            finite=not self._settled.target.faulty[i],
            nothing_left=self._settled.judged.constraint.nothing_left(i),
        )
