"""A version's way from shadow to canary to champion, or straight back: a table, and what to do next. Pure.

Duty: the stages, which moves lead where, and the next move of a rollout given its plan, where it stands, and what its
guards say. It knows no Redis, no clock and no statistics beyond their verdict: the controller brings all three, applies
the move by compare-and-set, and may be two controllers at once.
Strategy: TABLE holds every move; an unknown pair raises. `propose` is a function of values, so that two controllers who
see the same propose the same, and the one who sees less proposes `HOLD`.
Promise: missing evidence holds; a rollback latches until a person releases the version; what `mode: manual` would have
done waits as a proposal.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NamedTuple

import msgspec
from msgspec import Struct

from shadow.rollout_plan import RolloutPlan as RolloutPlan
from shadow.verdicts import Verdict


class Stage(StrEnum):
    REGISTERED = "registered"
    SHADOW = "shadow"
    CANARY = "canary"
    CHAMPION = "champion"
    RETIRED = "retired"
    QUARANTINED = "quarantined"


class Move(StrEnum):
    WATCH = "watch"  # score the same states, decide nothing
    TRY = "try"  # the first step of the canary
    ADVANCE = "advance"  # the next step
    PROMOTE = "promote"
    REPLACE = "replace"  # another became champion
    ROLL_BACK = "roll_back"  # worse, by a guard
    QUARANTINE = "quarantine"  # by a person, or a breaker
    WITHDRAW = "withdraw"  # by a person, without blame
    RELEASE = "release"  # a person says that it is mended


BACK = (Move.ROLL_BACK, Move.QUARANTINE)
TABLE: dict[tuple[Stage, Move], Stage] = {
    (Stage.REGISTERED, Move.WATCH): Stage.SHADOW,
    (Stage.REGISTERED, Move.TRY): Stage.CANARY,  # a plan may do without a shadow
    (Stage.REGISTERED, Move.QUARANTINE): Stage.QUARANTINED,
    (Stage.SHADOW, Move.TRY): Stage.CANARY,
    (Stage.SHADOW, Move.WITHDRAW): Stage.REGISTERED,
    (Stage.SHADOW, Move.QUARANTINE): Stage.QUARANTINED,
    (Stage.CANARY, Move.ADVANCE): Stage.CANARY,
    (Stage.CANARY, Move.PROMOTE): Stage.CHAMPION,
    (Stage.CANARY, Move.ROLL_BACK): Stage.QUARANTINED,
    (Stage.CANARY, Move.WITHDRAW): Stage.REGISTERED,
    (Stage.CANARY, Move.QUARANTINE): Stage.QUARANTINED,
    (Stage.CHAMPION, Move.REPLACE): Stage.RETIRED,
    (Stage.CHAMPION, Move.QUARANTINE): Stage.QUARANTINED,
    (Stage.RETIRED, Move.WATCH): Stage.SHADOW,
    (Stage.RETIRED, Move.TRY): Stage.CANARY,
    (Stage.RETIRED, Move.QUARANTINE): Stage.QUARANTINED,
    (Stage.QUARANTINED, Move.RELEASE): Stage.REGISTERED,
}


def step(stage: Stage, move: Move) -> Stage:
    """Return the stage after a move. Raises ValueError for a pair that cannot be."""
    try:
        return TABLE[stage, move]
    except KeyError:
        raise ValueError(f"a {stage.value} version cannot {move.value.replace('_', ' ')}") from None


def diagram() -> str:
    """Draw TABLE for mermaid."""
    lines = ["stateDiagram-v2", f"    [*] --> {Stage.REGISTERED.name}: pushed"]
    lines += [f"    {one.name} --> {two.name}: {move.value.replace('_', ' ')}" for (one, move), two in TABLE.items()]
    return "\n".join(lines)


class Standing(Struct, frozen=True):
    """Where a version's rollout stands; part of the policy's control document. `plan` is the one it began with.

    Invariant: in the canary `floor < weight`, but where a person has lowered the weight: then nothing is measured.
    """

    id: str  # salts routing, so that each rollout meets other keys
    version: str
    champion: str  # what it is held against
    stage: Stage
    plan: RolloutPlan
    returns: tuple[float, float] = (0.0, 1.0)  # range of a unit's value
    margin: float = 0.0  # of the return, for this rollout
    step: int = 0  # of the plan's steps, in the canary
    weight: float = 0.0  # the share of units that the version decides
    floor: float = 0.0  # the largest weight that it had before, in this rollout: keys below it are not dealt anew
    place: int = 0  # steps begun before this one: its place in α
    since_ms: int = 0  # of the stage or step
    generation: int = 0  # the first control state of the stage or step
    paused: str = ""  # why nothing moves by itself; empty: it does
    resumed_ms: int = 0  # when a person let it go on last: max_duration_s counts anew from then
    proposal: Move | None = None  # what waits for a person
    reason: str = ""  # of the last move

    @property
    def latched(self) -> bool:
        """Whether only a person moves it forward."""
        return self.stage is Stage.QUARANTINED or bool(self.paused)

    @property
    def next_step(self) -> int | None:
        """Which of the plan's steps comes next: the first above the weight; None: it is to be promoted."""
        return next((at for at, share in enumerate(self.plan.steps) if share > self.weight), None)

    @property
    def under_way(self) -> bool:
        return self.stage in (Stage.SHADOW, Stage.CANARY)


class Evidence(NamedTuple):
    """What is known of the step under way. None of a verdict: not enough to say anything."""

    verdict: Verdict | None
    units: int  # of the challenger, ripe
    mismatched: bool = False  # the sample ratio is not what routing meant: nothing else can be believed
    gate: Literal["passes", "fails", "no_evidence"] = "no_evidence"  # of the shadow
    reason: str = ""  # which guard, with its numbers
    broken: str = ""  # why its network is not asked any more, where it is not
    blind: str = ""  # why nothing can be measured in this step, where nothing can


class Proposal(NamedTuple):
    """The next move, or none and why. `pause`: stop here and ask a person."""

    move: Move | None
    reason: str
    pause: bool = False


def propose(standing: Standing, evidence: Evidence, now_ms: int) -> Proposal:
    """Say what should happen next.

    What is broken goes, and a rollback comes before everything else, also before hold times, modes and pauses: they are
    never proposed, they are done.
    """
    if standing.under_way and evidence.broken:
        return Proposal(Move.QUARANTINE, evidence.broken)
    if standing.stage is Stage.CANARY and evidence.verdict is Verdict.ROLLBACK:
        return Proposal(Move.ROLL_BACK, evidence.reason or "a guard found it worse")
    if standing.latched or not standing.under_way:
        return Proposal(None, standing.paused or f"{standing.stage.value}: nothing moves by itself")
    if evidence.mismatched:
        return Proposal(None, "units are not assigned as routing means to: the sample ratio is off", pause=True)
    if evidence.verdict is Verdict.PAUSE:
        return Proposal(None, evidence.reason or "a guard found it worse, and asks for a person", pause=True)
    waited_s = (now_ms - standing.since_ms) / 1000
    overdue = (now_ms - max(standing.since_ms, standing.resumed_ms)) / 1000 >= standing.plan.max_duration_s
    if standing.stage is Stage.SHADOW:
        return _out_of_shadow(standing.plan, evidence, waited_s, overdue=overdue)
    return _along(standing, evidence, waited_s, overdue=overdue)


def _out_of_shadow(plan: RolloutPlan, evidence: Evidence, waited_s: float, *, overdue: bool) -> Proposal:
    if evidence.gate == "fails":
        return Proposal(None, evidence.reason or "the gate before the canary fails", pause=True)
    if waited_s < plan.hold_s:
        return Proposal(None, f"watched for {waited_s:.0f} of {plan.hold_s:.0f} s")
    if evidence.gate == "passes":
        return Proposal(Move.TRY, evidence.reason or "the gate before the canary passes")
    if plan.gate == "advisory":
        return Proposal(Move.TRY, "nothing speaks against it, and the plan asks for no more")
    if overdue:
        return Proposal(None, "no evidence by max_duration_s", pause=True)
    return Proposal(None, evidence.reason or "no evidence yet")


def _along(standing: Standing, evidence: Evidence, waited_s: float, *, overdue: bool) -> Proposal:
    plan = standing.plan
    ready = waited_s >= plan.hold_s and evidence.units >= plan.min_units
    if ready and evidence.verdict is Verdict.ADVANCE:
        return Proposal(Move.PROMOTE if standing.next_step is None else Move.ADVANCE, evidence.reason)
    if overdue:
        return Proposal(None, "neither better nor worse by max_duration_s", pause=True)
    if evidence.blind:
        return Proposal(None, f"nothing is measured, by no guard: {evidence.blind}")
    if evidence.units < plan.min_units:
        return Proposal(None, f"{evidence.units} of {plan.min_units} units")
    if waited_s < plan.hold_s:
        return Proposal(None, f"held for {waited_s:.0f} of {plan.hold_s:.0f} s")
    return Proposal(None, evidence.reason or "the guards have not decided")


def moved(standing: Standing, proposal: Proposal, now_ms: int) -> Standing:
    """Apply a proposal by the service itself: done, or in `mode: manual` kept for a person, the way back excepted."""
    if proposal.pause:
        return msgspec.structs.replace(standing, paused=proposal.reason, reason=proposal.reason)
    if proposal.move is None:
        return standing
    if standing.plan.mode == "manual" and proposal.move not in BACK:
        return msgspec.structs.replace(standing, proposal=proposal.move, reason=proposal.reason)
    return applied(standing, proposal.move, proposal.reason, now_ms)


def applied(standing: Standing, move: Move, reason: str, now_ms: int) -> Standing:
    """Make a move. Raises ValueError where the table has none, or there is no further step."""
    stage = step(standing.stage, move)
    at = standing.next_step if move is Move.ADVANCE else 0
    if at is None:
        raise ValueError("there is no step after the last: promote it")
    following = msgspec.structs.replace(
        standing, stage=stage, step=at, since_ms=now_ms, paused="", proposal=None, reason=reason
    )
    return weighed(following, standing.plan.steps[at] if stage is Stage.CANARY else 0.0)


def weighed(standing: Standing, weight: float) -> Standing:
    """Begin a stretch of another weight: a step with a place of its own in α."""
    tried = standing.weight > 0.0 and weight > 0.0
    return msgspec.structs.replace(
        standing,
        weight=weight,
        floor=max(standing.floor, standing.weight) if weight > 0.0 else standing.floor,
        place=standing.place + tried,
    )


def turned(standing: Standing, weight: float, reason: str, now_ms: int) -> Standing:
    """Give a canary the weight that a person says. Raises ValueError elsewhere, or for what is no share."""
    if standing.stage is not Stage.CANARY:
        raise ValueError(f"a {standing.stage.value} version has no weight")
    if not 0.0 < weight < 1.0:
        raise ValueError("a weight lies between 0 and 1")
    at = max((i for i, each in enumerate(standing.plan.steps) if each <= weight), default=0)
    changed = msgspec.structs.replace(standing, step=at, since_ms=now_ms, proposal=None, reason=reason)
    return weighed(changed, weight)
