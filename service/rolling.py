"""A rollout and the deployment that it changes: from one control document to the next. Pure.

Duty: what each move does to who decides and who watches, what is refused, which versions are latched. The stages and
their order are `shadow/rollout.py`'s; who asks, and compare-and-set, are `changes.py`'s and `rollouts.py`'s.
Strategy: a document goes in, the next one comes out; its generation is for whoever puts it in force to count on.
Promise: the deployment and the standing never disagree: the version under way is a shadow, or the only challenger, at
the standing's weight; one that is quarantined decides nothing until a person releases it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec.structs import replace

from policies.deployment import MOST_SHADOWS, Challenger, Deployment
from policies.errors import InvalidField, MoveRefused
from service.document import Document, Mark
from shadow.rollout import Move, Proposal, Stage, Standing, applied, moved, step, turned
from shadow.rollout_plan import RolloutPlan
from shadow.verdicts import Account


def begun(document: Document, version: str, digest: str, rollout_id: str, reason: str, now_ms: int) -> Document:
    """Begin a version's rollout by the policy's plan. Raises MoveRefused, or InvalidField naming the plan's field."""
    deployment = document.deployment
    _free(document, version)
    mark = document.marks.get(version)
    if mark is not None and mark.stage is Stage.QUARANTINED and mark.digest == digest:
        raise MoveRefused(f"{version} is quarantined ({mark.reason}): release it first", "version")
    plan = document.rollout or RolloutPlan()
    returns = returns_of(plan, deployment)
    standing = Standing(
        rollout_id,
        version,
        deployment.champion,
        Stage.REGISTERED,
        plan,
        returns,
        Account(plan.margin(returns), document.margin_spent).left,
    )
    cleared = {label: each for label, each in document.marks.items() if label != version}
    return _moved(replace(document, marks=cleared), standing, Move.WATCH if plan.shadow else Move.TRY, reason, now_ms)


def next_version(document: Document, pushed: Mapping[str, int]) -> str | None:
    """The version whose rollout should begin by itself: the one pushed last, if it has not been tried. pushed: when."""
    plan, standing = document.rollout, document.standing
    if plan is None or plan.begin != "pushed" or not pushed or (standing is not None and standing.under_way):
        return None
    newest = max(pushed, key=lambda label: pushed[label])
    known = {document.deployment.champion, *([] if standing is None else [standing.version])}
    if newest in known | document.marks.keys() | document.deployment.by_role.keys():
        return None
    return newest if all(pushed[newest] > pushed.get(label, 0) for label in known) else None


def returns_of(plan: RolloutPlan, deployment: Deployment) -> tuple[float, float]:
    """Between what a unit's value lies. Raises InvalidField where nobody says."""
    low, high = deployment.reward.range
    if plan.return_range is not None:
        return plan.return_range
    if plan.objective == "step" and low is not None and high is not None and low < high:
        return low, high
    raise InvalidField("say between which values the return of a unit lies", "rollout.return_range")


def made(
    document: Document, move: Move, reason: str, now_ms: int, digest: str = "", lower: float | None = None
) -> Document:
    """Make a move of the rollout under way. digest: of its version. lower: of the return, where it was proven.

    Raises MoveRefused where the table has no such move.
    """
    standing = standing_of(document)
    if move is Move.QUARANTINE and standing.stage is Stage.CHAMPION:
        _returnable(document, standing)
    elif not standing.under_way:
        raise MoveRefused(f"the rollout of {standing.version} has ended ({standing.stage.value}): begin another")
    after = _moved(document, standing, move, reason, now_ms, digest)
    if move is Move.PROMOTE and lower is not None:
        spent = Account(standing.margin, document.margin_spent).promoted(lower).spent
        return replace(after, margin_spent=spent)
    return after


def followed(
    document: Document, proposal: Proposal, now_ms: int, digest: str = "", lower: float | None = None
) -> Document:
    """Do what the service proposes by itself, or keep it for a person; the same document where there is nothing to do.

    digest, lower: as `made`.
    """
    standing = standing_of(document)
    after = moved(standing, proposal, now_ms)
    if after.proposal is not None and after.proposal is standing.proposal:
        return document  # it waits already
    if proposal.move is not None and after.proposal is None and not proposal.pause:
        return made(document, proposal.move, proposal.reason, now_ms, digest, lower)
    return document if after == standing else replace(document, standing=after)


def weighed(document: Document, weight: float, reason: str, now_ms: int) -> Document:
    """Give the canary another weight. Raises MoveRefused, or InvalidField."""
    standing = standing_of(document)
    if not 0.0 < weight < 1.0:
        raise InvalidField("a weight lies between 0 and 1", "weight")
    try:
        return _with(document, turned(standing, weight, reason, now_ms))
    except ValueError as error:
        raise MoveRefused(str(error)) from None


def paused(document: Document, reason: str) -> Document:
    """Let nothing move by itself, rollbacks excepted. Raises MoveRefused."""
    standing = standing_of(document)
    if not standing.under_way:
        raise MoveRefused(f"{standing.version} is {standing.stage.value}: there is nothing to pause")
    return replace(document, standing=replace(standing, paused=reason or "by hand", reason=reason or "by hand"))


def resumed(document: Document, reason: str, now_ms: int) -> Document:
    """Let things move by themselves again, for as long as a step may take. Raises MoveRefused."""
    standing = standing_of(document)
    if not standing.paused:
        raise MoveRefused(f"{standing.version} is not paused")
    return replace(document, standing=replace(standing, paused="", resumed_ms=now_ms, reason=reason or "resumed"))


def quarantined(document: Document, version: str, digest: str, reason: str, now_ms: int) -> Document:
    """Latch a version, whatever it does now. Raises MoveRefused where nobody would decide in its place."""
    standing, deployment = document.standing, document.deployment
    its = standing is not None and standing.version == version
    if its and standing is not None and (standing.under_way or standing.stage is Stage.CHAMPION):
        return made(document, Move.QUARANTINE, reason, now_ms, digest)
    if version in (deployment.champion, deployment.baseline):
        raise MoveRefused(f"{version} is {deployment.role_of(version)}: let another version decide first", "version")
    found = document.marks.get(version)
    stage = _after(found.stage if found is not None else Stage.REGISTERED, Move.QUARANTINE)
    if its and standing is not None:
        standing = replace(standing, stage=stage, reason=reason)
    marks = document.marks | {version: Mark(stage, reason, now_ms, digest)}
    return replace(document, standing=standing, marks=marks, deployment=_without(deployment, version))


def released(document: Document, version: str, reason: str) -> Document:
    """Say that a quarantined version may be tried again. Raises MoveRefused."""
    mark = document.marks.get(version)
    if mark is None or mark.stage is not Stage.QUARANTINED:
        raise MoveRefused(f"{version} is not quarantined", "version")
    standing = document.standing
    if standing is not None and standing.version == version:
        standing = replace(standing, stage=Stage.REGISTERED, reason=reason or "released")
    return replace(
        document, standing=standing, marks={label: each for label, each in document.marks.items() if label != version}
    )


def redeployed(
    document: Document, wanted: Deployment, now_ms: int, digest_of: Callable[[str], str] = lambda label: ""
) -> Document:
    """Replace a deployment by hand. Raises MoveRefused for what a rollout under way depends on, and InvalidField for a
    version that is quarantined.
    """
    for label, at in wanted.deciding.items():
        mark = document.marks.get(label)
        if mark is not None and mark.stage is Stage.QUARANTINED and digest_of(label) in ("", mark.digest):
            raise InvalidField(f"{label} is quarantined ({mark.reason}): release it first", at)
    standing, now = document.standing, document.deployment
    if standing is not None and standing.stage is Stage.CHAMPION and wanted.champion != now.champion:
        standing = applied(standing, Move.REPLACE, f"{wanted.champion} was deployed", now_ms)
    if standing is None or not standing.under_way:
        return replace(document, deployment=wanted, standing=standing, marks=_remarked(document, wanted))
    for name in ("champion", "challengers", "route_by", "reward"):
        if getattr(wanted, name) != getattr(now, name):
            raise MoveRefused(f"a rollout of {standing.version} is under way: withdraw it first", name)
    if standing.version in now.shadows and standing.version not in wanted.shadows:
        raise MoveRefused(f"{standing.version} watches for its rollout: withdraw it first", "shadows")
    return replace(document, deployment=wanted)


def forgotten(document: Document, version: str) -> Document | None:
    """After a version was deleted: what is remembered of it goes, unless it is latched; None: there is nothing."""
    mark = document.marks.get(version)
    if mark is None or mark.stage is Stage.QUARANTINED:
        return None
    return replace(document, marks={label: each for label, each in document.marks.items() if label != version})


def after_trips(document: Document, digest_of: Callable[[str], str], now_ms: int) -> Document | None:
    """Roll back the version under way if its breaker has tripped; None: it has not."""
    standing = document.standing
    if standing is None or standing.stage is not Stage.CANARY or standing.version not in document.tripped:
        return None
    return made(document, Move.ROLL_BACK, "its breaker tripped", now_ms, digest_of(standing.version))


def barred(document: Document) -> frozenset[str]:
    """Versions that no episode stays on: quarantined, or withdrawn."""
    labels = {label for label, mark in document.marks.items() if mark.stage is Stage.QUARANTINED}
    standing = document.standing
    if standing is not None and standing.stage is Stage.REGISTERED:
        labels.add(standing.version)
    return frozenset(labels - document.deployment.deciding.keys())


def salt_of(document: Document, policy_salt: bytes) -> bytes:
    """What enters the hash that routes: each rollout meets other keys."""
    standing, challengers = document.standing, document.deployment.challengers
    if standing is None or not challengers or challengers[0].version != standing.version:
        return policy_salt
    return policy_salt + standing.id.encode()


def standing_of(document: Document) -> Standing:
    """The rollout under way, or the last one. Raises MoveRefused where there is none."""
    if document.standing is None:
        raise MoveRefused("there is no rollout: begin one")
    return document.standing


def _free(document: Document, version: str) -> None:
    """Refuse to begin a rollout where another one, or a person, has the challenger's place."""
    deployment, standing = document.deployment, document.standing
    if standing is not None and standing.under_way:
        raise MoveRefused(f"a rollout of {standing.version} is under way: one at a time", "version")
    if version in (deployment.champion, deployment.baseline):
        raise MoveRefused(f"{version} is {deployment.role_of(version)} already", "version")
    if deployment.challengers:
        label = deployment.challengers[0].version
        raise MoveRefused(f"the deployment names {label} as challenger: take it out first", "challengers")


def _returnable(document: Document, standing: Standing) -> None:
    """A champion goes only where the one before it comes back."""
    mark = document.marks.get(standing.champion)
    if document.deployment.champion != standing.version:
        raise MoveRefused(f"{standing.version} is not champion any more")
    if mark is not None and mark.stage is Stage.QUARANTINED:
        raise MoveRefused(f"{standing.champion}, which was champion before, is quarantined: deploy another version")


def _moved(document: Document, standing: Standing, move: Move, reason: str, now_ms: int, digest: str = "") -> Document:
    try:
        after = applied(standing, move, reason, now_ms)
    except ValueError as error:
        raise MoveRefused(str(error)) from None
    return _with(document, after, digest)


def _with(document: Document, standing: Standing, digest: str = "") -> Document:
    """Let the deployment follow the standing."""
    standing = replace(standing, generation=document.generation + 1)
    deployment, marks = _without(document.deployment, standing.version), dict(document.marks)
    spent = document.margin_spent
    if standing.stage is Stage.SHADOW:
        if len(deployment.shadows) >= MOST_SHADOWS:
            raise MoveRefused(f"{MOST_SHADOWS} shadows watch already, no more may", "shadows")
        deployment = replace(deployment, shadows=[*deployment.shadows, standing.version])
    elif standing.stage is Stage.CANARY:
        deployment = replace(deployment, challengers=[Challenger(standing.version, standing.weight)])
    elif standing.stage is Stage.CHAMPION:
        marks.pop(standing.version, None)
        marks[deployment.champion] = Mark(Stage.RETIRED, f"{standing.version} replaced it", standing.since_ms)
        deployment = replace(deployment, champion=standing.version)
    elif standing.stage is Stage.REGISTERED:
        marks[standing.version] = Mark(Stage.REGISTERED, standing.reason, standing.since_ms, digest)
    else:  # quarantined
        marks[standing.version] = Mark(Stage.QUARANTINED, standing.reason, standing.since_ms, digest)
        if deployment.champion == standing.version:
            marks.pop(standing.champion, None)
            deployment = replace(_without(deployment, standing.champion), champion=standing.champion)
            spent = max(0.0, standing.plan.margin(standing.returns) - standing.margin)  # as before it was charged
    return replace(document, standing=standing, deployment=deployment, marks=marks, margin_spent=spent)


def _without(deployment: Deployment, version: str) -> Deployment:
    """A deployment that neither tries a version nor lets it watch."""
    return replace(
        deployment,
        challengers=[each for each in deployment.challengers if each.version != version],
        shadows=[label for label in deployment.shadows if label != version],
    )


def _remarked(document: Document, wanted: Deployment) -> dict[str, Mark]:
    """A version that decides again is not retired."""
    return {label: mark for label, mark in document.marks.items() if label not in wanted.deciding}


def _after(stage: Stage, move: Move) -> Stage:
    try:
        return step(stage, move)
    except ValueError as error:
        raise MoveRefused(str(error)) from None
