"""What is known of a rollout's step, in a terminal's columns: units, guards, the gate, estimates. Pure.

Duty: words and columns. Numbers are those of the JSON, and nothing is computed from them but where they lie on a scale.
Strategy: a guard's scale has zero in the middle and reaches three margins to both sides, whatever the interval is. So
it stands still while the interval shrinks, and guards can be compared at a glance; what lies beyond is an arrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from service.columns import Line, Tone, count, field, finite, left, number, percent, row, span
from service.rollout_view import Estimate, Estimates, Evidence, Gate, Guard, Support, View

REACH = 3.0  # margins to each side of zero
LOOK_AT = {"step": "dr", "episode": "recursive_dr"}  # docs/estimates.md, "Which number to look at"
OUTCOMES: dict[str, tuple[str, Tone]] = {
    "passes": ("passes", "good"),
    "no_evidence": ("no evidence, which is no verdict on the version", "plain"),
    "fails": ("fails", "bad"),
}


def evidence_lines(view: View, now_ms: int, width: int) -> Iterator[Line]:
    """All that is known, block by block, each after an empty line."""
    evidence, standing = view.evidence, view.standing
    if evidence is not None:
        yield Line("")
        yield from _units(view, evidence, now_ms, width)
        for warning in evidence.warnings:
            yield from field("warning", warning, width, "bad")
        if evidence.guards:
            yield Line("")
            yield from guard_lines(evidence.guards, width)
    elif standing is not None and standing.stage == "canary":
        yield Line("")
        yield from field("evidence", "none yet", width)
    if view.gate is not None:
        yield Line("")
        yield from _gate(view.gate, width)
    if view.estimates:
        yield Line("")
        yield from estimate_lines(view.estimates, width)


def _units(view: View, evidence: Evidence, now_ms: int, width: int) -> Iterator[Line]:
    units, ratio, standing = evidence.units, evidence.ratio, view.standing
    challenger, champion = (standing.version, standing.champion) if standing else ("challenger", "")
    least = f" of at least {count(standing.plan.min_units)}" if standing and standing.plan else ""
    left_out = "; left out: " + ", ".join(f"{count(n)} {why}" for why, n in units.left_out.items())
    said = f"{challenger} {count(units.challenger)}{least}; {champion or 'champion'} {count(units.champion)}"
    yield from field("units", f"{said}; open {count(units.open)}{left_out if units.left_out else ''}", width)
    if ratio is not None:
        took = f"{percent(ratio.share)} of {count(ratio.challengers + ratio.champions, 'unit')} went to {challenger}"
        wrong = ": MISMATCHED, nothing else can be believed" if ratio.mismatched else ""
        tone: Tone = "bad" if ratio.mismatched else "plain"
        yield from field("ratio", f"{took}, meant {percent(ratio.meant)}{wrong}", width, tone)
    through = "nothing yet"
    if evidence.through_ms > 0:
        through = f"all that happened until {span((now_ms - evidence.through_ms) // 1000)} ago"
    yield from field("evidence", f"{span((now_ms - evidence.at_ms) // 1000)} old; of {through}", width, "dim")
    if evidence.verdict is not None:
        worse = evidence.verdict in ("rollback", "pause")
        yield from field("verdict", evidence.verdict, width, "bad" if worse else "plain")


def guard_lines(guards: dict[str, Guard], width: int) -> Iterator[Line]:
    """A line for each guard: its numbers, its interval on a scale, what happens if it is worse, and what is known."""
    scale = min(31, (width - 64) // 2 * 2 - 1)  # odd: zero is in the middle
    widths = (min(20, width - 54 - scale), 7, 7, 7, 7)
    heading = row(("guard", "estim.", "lower", "upper", "-margin"), widths)
    yield Line(f"{heading} {left(_axis(scale), scale)} if worse  so far", "head")
    for name, guard in guards.items():
        margin = None if guard.margin is None else -guard.margin
        numbers = (number(each) for each in (guard.estimate, guard.lower, guard.upper, margin))
        said, tone = _said(guard)
        text = f"{row((name, *numbers), widths)} {interval(guard, scale)} {left(guard.action, 8)}  {left(said, 10)}"
        yield Line(text.rstrip(), tone)


def _axis(cells: int) -> str:
    """What the scale's ends and middle are."""
    side = cells // 2
    return f"{left('worse', side)}0{'better'[:side].rjust(cells - side - 1)}"


def _said(guard: Guard) -> tuple[str, Tone]:
    """What is known of a guard, in words."""
    if guard.worse:
        return "worse", "bad"
    if guard.superior:
        return "better", "good"
    if guard.proven:
        return "not worse", "good"
    if guard.lost:
        return f"{number(guard.lost, 5)} lost", "bad"
    return ("unproven" if guard.must_prove else "undecided"), "plain"


def interval(guard: Guard, cells: int) -> str:
    """Draw a guard's bounds: `[--o--]`, with `|` at zero and `!` at -margin; `<` and `>`: they lie beyond the scale."""
    margin, ends = finite(guard.margin), (finite(guard.lower), finite(guard.upper))
    largest = max(abs(each) for each in (*ends, 0.0) if each is not None)
    unit = margin or largest / REACH or 1.0  # Invariant: unit > 0
    drawn = ["."] * cells
    low = 0 if ends[0] is None else _place(ends[0] / unit, cells)
    high = cells - 1 if ends[1] is None else _place(ends[1] / unit, cells)
    for at in range(max(low, 0), min(high, cells - 1) + 1):
        drawn[at] = "-"
    drawn[cells // 2] = "|"
    for at, end in ((low, "["), (high, "]")):
        drawn[min(max(at, 0), cells - 1)] = "<" if at < 0 else ">" if at >= cells else end
    estimate = finite(guard.estimate)
    if estimate is not None and 0 <= (at := _place(estimate / unit, cells)) < cells:
        drawn[at] = "o"
    if margin is not None:
        drawn[_place(-margin / unit, cells)] = "!"
    return "".join(drawn)


def _place(margins: float, cells: int) -> int:
    """The cell of a value; -1 and `cells`: beyond the ends."""
    if not -REACH <= margins <= REACH:
        return -1 if margins < 0 else cells
    return round((margins / REACH + 1.0) / 2.0 * (cells - 1))


def _gate(gate: Gate, width: int) -> Iterator[Line]:
    said, tone = OUTCOMES.get(gate.outcome, (gate.outcome, "plain"))
    yield from field("gate", said, width, tone)
    for reason in gate.reasons:
        yield from field("", reason, width)


def estimate_lines(estimates: dict[str, Estimates], width: int) -> Iterator[Line]:
    """A line for each version, in the order in which to read; then what forbids to read on."""
    widths = (min(24, width - 70), 7, 20, 7, 7, 7, 7, 7)
    methods = dict.fromkeys(each.method for found in estimates.values() if (each := _of_interest(found)))
    yield from field("estimates", f"of a version's worth, by {', '.join(methods) or 'no method'}", width)
    names = ("version", "unsupp.", "mean weight", "lower", "upper", "value", "eff. n", "matched")
    yield Line(row(names, widths), "head")
    doubts: list[Line] = []
    for label, found in estimates.items():
        estimate = _of_interest(found)
        if estimate is None:
            yield Line(left(label, widths[0]) + " nothing yet", "dim")
            continue
        support = estimate.support
        numbers = (estimate.lower, estimate.upper, estimate.value, support.effective_n, support.matched)
        cells = (label, number(support.unsupported), _weight(support), *map(number, numbers))
        yield Line(row(cells, widths), "dim" if _doubtful(support) else "plain")
        doubts += (
            line for why in _doubts(estimate, found.objective) for line in field("", f"{label}: {why}", width, "dim")
        )
    yield from doubts


def _of_interest(found: Estimates) -> Estimate | None:
    """The estimate to look at; without a model there is none, and the first stands in."""
    wanted = LOOK_AT.get(found.objective)
    return next((each for each in found.methods if each.method == wanted), next(iter(found.methods), None))


def _weight(support: Support) -> str:
    """The mean weight, with its interval: it must cover 1."""
    low, high = (number(each, 5) for each in (support.mean_weight_low, support.mean_weight_high))
    return f"{number(support.mean_weight, 5)} [{low}, {high}]"


def _doubtful(support: Support) -> bool:
    low, high = finite(support.mean_weight_low), finite(support.mean_weight_high)
    return support.outside > 0 or low is None or high is None or not low <= 1.0 <= high


def _doubts(estimate: Estimate, objective: str) -> Iterable[str]:
    support = estimate.support
    low, high = finite(support.mean_weight_low), finite(support.mean_weight_high)
    if estimate.method != LOOK_AT.get(objective):
        yield f"by {estimate.method}: there is no {LOOK_AT.get(objective, 'other')} yet"
    if low is not None and high is not None and not low <= 1.0 <= high:
        yield "the mean weight does not cover 1: do not believe the rest"
    if support.outside:
        yield f"{count(support.outside, 'value')} outside what is declared: no bound holds"
