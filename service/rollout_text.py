"""A rollout in a terminal's columns: where it stands, what it waits for, what moved it. Pure.

Duty: words and columns, for `surefoot rollout show`, `watch` and the moves. The statistics' part stands in
`rollout_evidence_text.py`. It knows neither a terminal nor the service.
Promise: no line is wider than was said, whatever the view holds; at 80 columns nothing but long names is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from service.columns import Line, Tone, cells, clean, count, field, fit, left, number, percent, span
from service.rollout_evidence_text import evidence_lines
from service.rollout_view import GuardPlan, Mark, Plan, Standing, View

NARROWEST, WIDEST = 80, 120  # what is laid out; a narrower terminal cuts lines
MARKS = 5  # the newest that are shown
# The move of the command line that does what is proposed.
COMMANDS = {"try": "advance", "advance": "advance", "promote": "promote"}


def frame(view: View, now_ms: int, width: int, *, planned: bool = False) -> list[Line]:
    """All that is known of a rollout, in so many columns. now_ms: the service's time. planned: its plan as well."""
    wide = max(NARROWEST, min(WIDEST, width))
    lines = [*_head(view, now_ms, wide), *_standing(view, now_ms, wide)]
    lines += evidence_lines(view, now_ms, wide)
    lines += _moves(view, now_ms, wide)
    if planned:
        lines += _planned(view, wide)
    return [Line(fit(line.text, width), line.tone) for line in lines]


def _planned(view: View, width: int) -> Iterator[Line]:
    """The plan of the rollout under way, else that of the next one."""
    standing = view.standing
    under_way = standing.plan if standing is not None and standing.under_way else None
    plan = under_way or view.plan
    if plan is None:
        return
    yield Line("")
    yield from _plan(plan, width)
    if under_way is not None and under_way != view.plan:
        told = f"the next rollout goes by another: `surefoot rollout plan {view.policy}` prints it"
        yield from field("", told, width, "head")


def _plan(plan: Plan, width: int) -> Iterator[Line]:
    """A plan for people; `surefoot rollout plan` prints it for editors."""
    steps = " ".join(f"{100 * each:.4g}" for each in plan.steps)
    first = f"shadow, the gate {plan.gate}, then canary" if plan.shadow else "canary"
    yield from field("plan", f"{first} {steps} %; mode {plan.mode}, alpha {percent(plan.alpha)}", width)
    if plan.begin == "pushed":
        yield from field("begins", "by itself, with the version that was pushed last", width)
    least = f"{span(plan.hold_s)} and {count(plan.min_units, 'unit')}"
    yield from field("each step", f"at least {least}, at most {span(plan.max_duration_s)}", width)
    unit = f"{plan.objective}, of the first {span(plan.unit_time_s)}"
    if plan.objective == "step":
        unit += f" and {count(plan.unit_decisions, 'decision')}"
    worth = " to ".join(map(number, plan.return_range)) if plan.return_range else "what rewards may be"
    yield from field("a unit", f"{unit}, worth {worth}", width)
    for name, guard in plan.guards.items():
        yield from field("guard", f"{name}: {', '.join(_differs(guard)) or 'as always'}", width)


def _differs(guard: GuardPlan) -> Iterator[str]:
    """What a plan says of a guard; the rest is as always."""
    if guard.margin is not None:
        yield f"margin {number(guard.margin)}"
    if guard.action is not None:
        yield guard.action
    if guard.must_prove is not None:
        yield "must prove" if guard.must_prove else "need not prove"


def summary(view: View, version: str | None = None) -> str:
    """What a move has come to, in a few lines. version: whose mark is told as well."""
    policy, standing = view.policy, view.standing
    lines = [f"{policy}: {_where(standing) if standing else 'no rollout'}; generation {count(view.generation)}"]
    if standing is not None and standing.paused:
        lines.append(f"paused: {standing.paused}")
    elif view.next:
        lines.append(f"waits for: {view.next}")
    if version in view.marks:
        mark = view.marks[version]
        lines.append(f"{version} is {mark.stage}{f': {mark.reason}' if mark.reason else ''}")
    return "\n".join(map(clean, lines))


def _head(view: View, now_ms: int, width: int) -> Iterator[Line]:
    about = f"generation {count(view.generation)}   {_clock(now_ms)}"
    yield Line(f"{left(view.policy, max(1, width - cells(about) - 1))} {about}", "head")
    standing = view.standing
    if standing is not None and standing.under_way:
        against = f"{standing.version} against champion {standing.champion or view.champion or '-'}"
        plan = standing.plan
        planned = f"; objective {plan.objective}, mode {plan.mode}" if plan else ""
        yield from field("rollout", f"{against} ({standing.id}){planned}", width)
        return
    yield from field("champion", view.champion or "-", width)
    if standing is not None:
        yield from field("rollout", f"none now; the last was of {standing.version} ({standing.id})", width)
        return
    yield from field("rollout", f"none: `surefoot rollout begin {view.policy} VERSION` begins one", width)
    if view.plan is None:
        yield from field("plan", f"none: `surefoot rollout plan {view.policy}` prints one to begin with", width)


def _clock(at_ms: int) -> str:
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # not a time of this calendar
        return "-"


def _standing(view: View, now_ms: int, width: int) -> Iterator[Line]:
    standing = view.standing
    if standing is None:
        return
    plan = standing.plan
    tone: Tone = {"quarantined": "bad", "champion": "good"}.get(standing.stage, "plain")  # type: ignore[assignment]
    yield from field("stage", ladder(standing, plan or Plan(), width - 11), width, tone)
    lasted = span((now_ms - standing.since_ms) // 1000)
    yield from field("now", f"{_where(standing)}, for {lasted}{_limits(standing, plan)}", width)
    if standing.paused:
        yield from field("PAUSED", f"{standing.paused}; `surefoot rollout resume {view.policy}` goes on", width, "bad")
    if standing.proposal is not None:
        command = COMMANDS.get(standing.proposal, standing.proposal)
        done = f"`surefoot rollout {command} {view.policy}` does it"
        yield from field("proposed", f"{standing.proposal}, which waits for a person: {done}", width, "head")
    if view.next:
        yield from field("waits for", view.next, width)


def _where(standing: Standing) -> str:
    """Which version is where, with its weight."""
    if standing.stage != "canary":
        return f"{standing.version} is {'a ' if standing.stage == 'shadow' else ''}{standing.stage}"
    steps = f" of {len(standing.plan.steps)}" if standing.plan else ""
    return f"{standing.version} has {percent(standing.weight)}, step {count(standing.step + 1)}{steps}"


def _limits(standing: Standing, plan: Plan | None) -> str:
    if plan is None or not standing.under_way:
        return ""
    return f" of at least {span(plan.hold_s)}, at most {span(plan.max_duration_s)}"


def ladder(standing: Standing, plan: Plan, width: int) -> str:
    """The way of a version, its place in brackets. Of many steps those near its place are shown."""
    rungs = ["registered", *(["shadow"] if plan.shadow or standing.stage == "shadow" else [])]
    steps = [f"{100 * share:.3g}" for share in plan.steps] or ["?"]
    here = _rung(standing, len(rungs), len(steps))
    beside = "" if here is not None else f" [{standing.stage}]"
    around = len(steps)
    while cells(way := _joined(rungs, steps, here, around) + beside) > width and around > 1:
        around -= 1
    return way


def _rung(standing: Standing, before: int, steps: int) -> int | None:
    """The place on the ladder; None: it stands beside it."""
    if standing.stage == "canary":
        return before + min(max(standing.step, 0), steps - 1)
    places = {"registered": 0, "shadow": before - 1, "champion": before + steps}
    return places.get(standing.stage)


def _joined(rungs: list[str], steps: list[str], here: int | None, around: int) -> str:
    """Write the ladder with so many steps at most, the place's own among them."""
    place = 0 if here is None else min(max(here - len(rungs), 0), len(steps) - 1)
    start = min(max(place - around // 2, 0), max(len(steps) - around, 0))
    marked = [f"[{each}]" if at == here else each for at, each in enumerate([*rungs, *steps, "champion"])]
    shown = marked[len(rungs) + start : len(rungs) + min(start + around, len(steps))]
    shown = ([".."] if start > 0 else []) + shown + ([".."] if start + around < len(steps) else [])
    return " > ".join([*marked[: len(rungs)], f"canary {' '.join(shown)} %", marked[-1]])


def _moves(view: View, now_ms: int, width: int) -> Iterator[Line]:
    """The last moves: why the rollout is where it is, where nothing above or below says so; and what was marked."""
    newest = sorted(view.marks.items(), key=lambda pair: pair[1].since_ms, reverse=True)
    standing = view.standing
    told = {"", standing.paused, *(mark.reason for _, mark in newest[:MARKS])} if standing else set()
    reason = standing.reason if standing and standing.reason not in told else ""
    if reason or newest:
        yield Line("")
    if reason:
        yield from field("last move", reason, width)
    for label, mark in newest[:MARKS]:
        yield from _mark(label, mark, now_ms, width)
    if len(newest) > MARKS:
        yield from field("", f"and {count(len(newest) - MARKS)} more marked", width, "dim")


def _mark(label: str, mark: Mark, now_ms: int, width: int) -> list[Line]:
    since = span((now_ms - mark.since_ms) // 1000)
    why = f": {mark.reason}" if mark.reason else ""
    return field("mark", f"{label} {mark.stage} {since} ago{why}", width, "dim" if mark.stage == "retired" else "plain")
