"""What a dry run found, as JSON: the rules in force and the tested ones side by side. Pure.

Duty: hold two trials of the same decisions against each other. It judges nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from msgspec import Struct

from policies.types import Ints
from safety.rules import Rule
from service.dry_run import EXAMPLES, OUTCOMES, Outcome, RuleCounts, Trial
from service.dry_run_facts import Seen, Versions
from service.ruling import Ruling

Cut = Literal["size", "time"]


class LookedAt(Struct, frozen=True):
    """What was looked at.

    keys: different ones. without_key: decisions. unloaded: of versions that are not loaded any more, judged as the
    champion with their own outputs. stood_in: another version had answered already, and is the one that was judged.
    unanswered: the network had failed. other_spaces: of other spaces than the policy has now; not judged, and not among
    `decisions`. cut: why it was not as many as were asked for, where there are more.
    """

    decisions: int
    first_ms: int | None
    last_ms: int | None
    keys: int
    without_key: int
    unloaded: int
    stood_in: int
    unanswered: int
    other_spaces: int
    cut: Cut | None


class Change(Struct, frozen=True):
    """Decisions with one outcome: by the rules in force, by the tested ones, by only one of the two; ids of these."""

    outcome: Outcome
    in_force: int
    tested: int
    newly: int
    no_longer: int
    newly_ids: list[str]
    no_longer_ids: list[str]


class Counts(Struct, frozen=True):
    """What one rule would have done, as in `RuleCounts`."""

    forbids: int
    takes: int
    narrows: int
    failed: int
    examples: list[str]


class RuleReport(Struct, frozen=True):
    """One rule by its name. in_force, tested: None where it is not among those rules."""

    name: str
    kind: str
    mode: str
    reason: str
    in_force: Counts | None
    tested: Counts | None


class Report(Struct, frozen=True):
    """What a dry run found.

    in_force, tested: digests; None: no rules. in_force_refused: the rules in force do not fit the policy, and the
    fallback answers everything; they are shown as none. masked_mass: the mean target mass that rules take where the
    version still answers, in force and tested. replayed: names of rules whose past was replayed from these decisions.
    """

    policy: str
    in_force: str | None
    tested: str | None
    in_force_refused: str | None
    looked_at: LookedAt
    changes: list[Change]
    masked_mass: tuple[float, float]
    rules: list[RuleReport]
    replayed: list[str]


@dataclass(frozen=True, slots=True)
class Judged:
    """Rules, and what became of them. refused: why they are not in force."""

    ruling: Ruling | None
    trial: Trial
    refused: str | None = None

    @property
    def digest(self) -> str | None:
        return None if self.ruling is None else self.ruling.ruleset.digest

    @property
    def replayed(self) -> set[str]:
        if self.ruling is None:
            return set()
        steps = {rule.name for rule in self.ruling.ruleset.rules.rules if _kind(rule) == "max_step"}
        return steps | {limit.name for limit in self.ruling.limits.all}


def report(
    policy: str,
    versions: Versions,
    decisions: Sequence[Seen],
    places: Sequence[int],
    in_force: Judged,
    tested: Judged,
    *,
    other_spaces: int = 0,
    cut: Cut | None = None,
) -> Report:
    """Report on the decisions at these places, which both trials have judged, in order of time."""
    before, after = in_force.trial, tested.trial
    at: Ints = np.array(places, dtype=np.int64)
    return Report(
        policy=policy,
        in_force=in_force.digest,
        tested=tested.digest,
        in_force_refused=in_force.refused,
        looked_at=_looked_at([decisions[i] for i in places], versions, other_spaces, cut),
        changes=[_change(name, before, after, at, decisions) for name in OUTCOMES],
        masked_mass=(_mean_mass(before, at), _mean_mass(after, at)),
        rules=_rules(before.rules, after.rules),
        replayed=sorted(in_force.replayed | tested.replayed),
    )


def _looked_at(seen: Sequence[Seen], versions: Versions, other_spaces: int, cut: Cut | None) -> LookedAt:
    return LookedAt(
        decisions=len(seen),
        first_ms=seen[0].at_ms if seen else None,
        last_ms=seen[-1].at_ms if seen else None,
        keys=len({each.key for each in seen} - {None}),
        without_key=sum(each.key is None for each in seen),
        unloaded=sum(not versions.loaded(each) for each in seen),
        stood_in=sum(each.stood_in for each in seen),
        unanswered=sum(not each.outputs for each in seen),
        other_spaces=other_spaces,
        cut=cut,
    )


def _mean_mass(trial: Trial, at: Ints) -> float:
    own = ~(trial.outcomes["fallback"][at] | trial.outcomes["stand_in"][at])
    return float(trial.masked[at].sum() / max(1, own.sum()))


def _change(name: Outcome, before: Trial, after: Trial, at: Ints, decisions: Sequence[Seen]) -> Change:
    was, would = before.outcomes[name][at], after.outcomes[name][at]
    ids = [[decisions[place].id for place in at[only][-EXAMPLES:].tolist()] for only in (would & ~was, was & ~would)]
    newly, no_longer = int((would & ~was).sum()), int((was & ~would).sum())
    return Change(name, int(was.sum()), int(would.sum()), newly, no_longer, *ids)


def _rules(before: dict[str, RuleCounts], after: dict[str, RuleCounts]) -> list[RuleReport]:
    """The tested rules in the order of their file, then those that would be gone."""
    names = [*after, *(name for name in before if name not in after)]
    return [_rule((after.get(name) or before[name]).rule, before.get(name), after.get(name)) for name in names]


def _rule(rule: Rule, before: RuleCounts | None, after: RuleCounts | None) -> RuleReport:
    return RuleReport(rule.name, _kind(rule), rule.mode, rule.reason, _counts(before), _counts(after))


def _counts(found: RuleCounts | None) -> Counts | None:
    if found is None:
        return None
    return Counts(found.forbids, found.takes, found.narrows, found.failed, found.examples)


def _kind(rule: Rule) -> str:
    return str(rule.__struct_config__.tag)
