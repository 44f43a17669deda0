"""What is known of each version that is estimated, and how complete units add to it. Pure.

Duty: units of a bucket to rows of the estimators for each shadow and each live version, their tallies, and what is told
of them: estimates, the champion's value over the same time, the gate's verdict. It knows no Redis and no stream.
Strategy: a shadow is judged on all units that it has scored, whoever decided; a live version on units assigned to it.
Each shadow has a second tally beside its own: the champion on its own units since the shadow came, without a model.
Promise: the same buckets give the same tallies, to the last bit, whoever adds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Final, Literal

import msgspec
import numpy as np

from policies.deployment import RewardPolicy, RouteBy
from policies.types import ActionSpec, Choices, ObservationSpec
from service.estimate_rows import Judging, Said, own_step, shadow_step
from service.estimate_units import Complete, Thinning, Units
from shadow import rows as columns
from shadow.estimate import Estimate, Estimates
from shadow.estimators import ModelTerms, Tally, Terms
from shadow.gate import GateConfig, Verdict, gate
from shadow.paths import Range
from shadow.rollout import RolloutPlan
from shadow.rows import Rows, Step, Unit, assemble

TOGETHER: Final = 64  # units that are added at once: a grid of 64 episodes of 500 steps and 16 actions takes 4 MB
MOST_FEATURES: Final = 64
MOST_ACTIONS: Final = 64
MOST_MODEL_BYTES: Final = 1 << 20  # of sums, which are written to Redis with each save
Kind = Literal["live", "shadow"]


@dataclass(frozen=True, slots=True)
class Watched:
    """What is to be estimated of a policy. live: label -> digest, the champion included; shadows: the same."""

    plan: RolloutPlan
    champion: str
    live: Mapping[str, str]
    shadows: Mapping[str, str]
    reward: RewardPolicy
    route_by: RouteBy | None
    observation: ObservationSpec
    action: ActionSpec

    def units(self, named: bool, patience_ms: int) -> Units:
        """What a unit is. named: some decisions have a key or an episode."""
        plan, sequential = self.plan, self.plan.objective == "episode"
        return Units(
            objective=plan.objective,
            route_by=self.route_by,
            named=sequential or (named and self.route_by != "decision"),
            time_ms=int(plan.unit_time_s * 1000),
            window_ms=int(self.reward.window_s * 1000),
            decisions=plan.unit_decisions,
            patience_ms=patience_ms,
        )

    def terms(self, units: Units) -> Terms:
        """What the estimators are asked. Raises ValueError for a range that is none."""
        sequential, model = units.objective == "episode", self._model()
        low, high = self.reward.range
        returns = self.plan.return_range
        if returns is None:
            raise ValueError("nobody says between which values returns lie")
        rewards = (low, high) if sequential and low is not None and high is not None else None
        return Terms(
            objective=units.objective,
            returns=Range(low=returns[0], high=returns[1], rewards=rewards),
            most_rows=units.decisions if units.named else 1,
            alpha=self.plan.alpha,
            model=model,
        )

    def judging(self, terms: Terms) -> Judging:
        """How steps are read."""
        worst = self.reward.range[0] if self.reward.range[0] is not None else None
        if worst is None and terms.objective == "step":
            worst = terms.returns.low
        model = terms.model
        return Judging(worst, 0 if model is None else model.actions, 0 if model is None else model.features)

    def _model(self) -> ModelTerms | None:
        """A model where there are few numbers and few choices; points and several factors have none."""
        if not isinstance(self.action, Choices) or self.action.factors or len(self.observation.shape) != 1:
            return None
        actions, features = self.action.size, self.observation.size
        asked = ModelTerms(actions=actions, features=features)
        size = 8 * asked.folds * actions * (features + 1) * (features + 2)
        if actions > MOST_ACTIONS or features > MOST_FEATURES or size > MOST_MODEL_BYTES:
            return None
        return asked


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One version. It begins anew when `identity` changes: its content, its kind, or the champion it is held against.

    unscored: decisions (`step`) or episodes that a shadow did not score; thinned: episodes that its share did not keep.
    """

    kind: Kind
    digest: str
    champion: tuple[str, str]  # label and digest; of a shadow, else empty
    since_ms: int
    tally: Tally
    beside: Tally | None = None  # the champion over the same time
    unscored: int = 0
    thinned: int = 0
    broken: int = 0  # units whose numbers contradict each other

    @property
    def identity(self) -> tuple[Kind, str, tuple[str, str]]:
        return self.kind, self.digest, self.champion


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What is told of a version. method: the one that the gate looks at. champion_value: over the same time."""

    version: str
    kind: Kind
    digest: str
    since_ms: int
    method: str
    estimates: Estimates
    verdict: Verdict | None = None
    champion_value: float | None = None
    unscored: int = 0
    thinned: int = 0
    broken: int = 0


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What is told of a policy. through_ms: units that started before are counted. left_out: decisions, by reason."""

    at_ms: int
    since_ms: int
    through_ms: int
    share: float
    waiting: int  # decisions whose unit is not complete
    left_out: dict[str, int]
    versions: dict[str, Told]


def follow(lines: Mapping[str, Line], watched: Watched, terms: Terms, now_ms: int) -> dict[str, Line]:
    """The versions that are asked for: those known go on, others begin now."""
    champion = (watched.champion, watched.live.get(watched.champion, ""))
    wanted: dict[str, tuple[Kind, str, tuple[str, str]]] = {
        label: ("live", digest, ("", "")) for label, digest in watched.live.items()
    }
    wanted |= {label: ("shadow", digest, champion) for label, digest in watched.shadows.items()}
    return {
        label: lines[label]
        if label in lines and lines[label].identity == identity
        else _fresh(*identity, terms, now_ms)
        for label, identity in sorted(wanted.items())
    }


def _fresh(kind: Kind, digest: str, champion: tuple[str, str], terms: Terms, now_ms: int) -> Line:
    beside = Tally.fresh(_plain(terms)) if kind == "shadow" else None
    return Line(kind=kind, digest=digest, champion=champion, since_ms=now_ms, tally=Tally.fresh(terms), beside=beside)


def _plain(terms: Terms) -> Terms:
    return msgspec.structs.replace(terms, model=None)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Units that started together, with the scores of their decisions by shadow, and the shares these were kept by."""

    units: list[Complete]
    scores: Mapping[str, Mapping[str, Said]]
    thinnings: Mapping[str, Thinning]


def add(lines: Mapping[str, Line], bucket: Bucket, units: Units, judging: Judging) -> dict[str, Line]:
    """Add a bucket to every version's tally."""
    return {label: _added(label, line, bucket, units, judging) for label, line in lines.items()}


def _added(label: str, line: Line, bucket: Bucket, units: Units, judging: Judging) -> Line:
    since = [unit for unit in bucket.units if unit.start_ms >= line.since_ms]
    if line.kind == "live":
        own = list(_own(since, label, line.digest, units, judging))
        tally, broken = _tallied(line.tally, own, units)
        return msgspec.structs.replace(line, tally=tally, broken=line.broken + broken)
    found, unscored, thinned = _scored(label, line, since, bucket, units, judging)
    tally, broken = _tallied(line.tally, found, units)
    beside = line.beside
    if beside is not None:
        beside, _ = _tallied(beside, list(_own(since, *line.champion, units, replace(judging, features=0))), units)
    return msgspec.structs.replace(
        line,
        tally=tally,
        beside=beside,
        unscored=line.unscored + unscored,
        thinned=line.thinned + thinned,
        broken=line.broken + broken,
    )


def _own(since: Sequence[Complete], label: str, digest: str, units: Units, judging: Judging) -> Iterator[Unit]:
    """Units that were assigned to a version, with its own steps."""
    for unit in since:
        if unit.rows[0].record.assigned_version != label:
            continue
        rows = unit.rows
        if units.objective == "step":  # a key that moves to another version leaves this one: nothing is missing
            rows = list(takewhile(lambda row: row.record.assigned_version == label, rows))
        steps = [own_step(row, label, digest, judging) for row in rows]
        yield Unit(unit.name, _numbered(steps), _whole(unit))


def _scored(
    label: str, line: Line, since: Sequence[Complete], bucket: Bucket, units: Units, judging: Judging
) -> tuple[list[Unit], int, int]:
    """Units that a shadow has scored, as far as it has; decisions or episodes that it has not; those not kept."""
    found: list[Unit] = []
    unscored = thinned = 0
    scores = {name: each for name, each in bucket.scores.get(label, {}).items() if each.digest == line.digest}
    for unit in since:
        if units.objective == "step":
            rows = [row for row in unit.rows if row.id in scores]
            unscored += len(unit.rows) - len(rows)
        elif unit.heights >= _kept(unit, bucket.thinnings.get(label), units):
            thinned += 1
            continue
        else:  # whether it was scored at all was settled before its first step; a later hole is a hole
            rows = unit.rows if unit.rows[0].id in scores else []
            unscored += not rows
        if rows:
            steps = [shadow_step(row, scores.get(row.id), line.champion, judging) for row in rows]
            found.append(Unit(unit.name, _numbered(steps), _whole(unit)))
    return found, unscored, thinned


def _kept(unit: Complete, thinning: Thinning | None, units: Units) -> float:
    """The least share that a shadow kept in a unit's time: above it, a long unit would lack steps."""
    return (
        1.0 if thinning is None else thinning.least(unit.start_ms, unit.start_ms + units.lasts_ms + units.patience_ms)
    )


def _whole(unit: Complete) -> bool:
    """Whether all of its return up to its age is known. Decisions made by then are all here; what tells is the last."""
    return unit.rows[-1].ended


def _numbered(steps: list[Step]) -> list[Step]:
    """Steps of callers who name none, in the order of their time."""
    if not steps or steps[0].step >= 0:
        return steps
    return [replace(step, step=place) if step.step < 0 else step for place, step in enumerate(steps)]


def _tallied(tally: Tally, units: Sequence[Unit], of: Units) -> tuple[Tally, int]:
    """Add units, and count those that contradict themselves."""
    broken = 0
    for first in range(0, len(units), TOGETHER):
        part = units[first : first + TOGETHER]
        try:
            tally = tally.add(_rows(part, of, tally.terms))
        except ValueError:
            for unit in part:
                try:
                    tally = tally.add(_rows([unit], of, tally.terms))
                except ValueError:
                    broken += 1
    return tally, broken


def _rows(units: Sequence[Unit], of: Units, terms: Terms) -> Rows:
    rows = assemble(units, sequential=of.objective == "episode")
    if terms.model is None or len(rows.rewards):
        return rows
    width = terms.model.actions
    none = columns.Choices(
        np.empty(0, np.int64), np.empty((0, width)), np.empty((0, width)), np.empty((0, terms.model.features))
    )
    return replace(rows, choices=none)


# -- what is told


def tell(lines: Mapping[str, Line], plan: RolloutPlan) -> dict[str, Told]:
    """Read everything off."""
    return {label: _told(label, line, plan) for label, line in lines.items()}


def _told(label: str, line: Line, plan: RolloutPlan) -> Told:
    estimates = line.tally.estimates()
    best = _best(estimates)
    value = None if line.beside is None else _champion_value(line.beside)
    verdict = None if line.kind == "live" else _verdict(best, value, plan)
    return Told(
        version=label,
        kind=line.kind,
        digest=line.digest,
        since_ms=line.since_ms,
        method=best.method,
        estimates=estimates,
        verdict=verdict,
        champion_value=value,
        unscored=line.unscored,
        thinned=line.thinned,
        broken=line.broken,
    )


def _best(estimates: Estimates) -> Estimate:
    """The estimate with a model where there is one: chosen before anything was seen, never because it looks better."""
    by_name = {each.method: each for each in estimates.methods}
    return by_name.get("dr") or by_name.get("recursive_dr") or estimates.methods[0]


def _champion_value(beside: Tally) -> float | None:
    """Of its own units, each divided by its weight: nearly everything that it did is what it would have done."""
    return beside.estimates().methods[1].value


def _verdict(best: Estimate, champion_value: float | None, plan: RolloutPlan) -> Verdict:
    if champion_value is None:
        return Verdict(outcome="no_evidence", reasons=("the champion's own value over the same time is not known yet",))
    return gate(best, champion_value, GateConfig(margin=plan.margin(plan.return_range or (0.0, 1.0))))
