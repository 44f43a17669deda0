"""A dry run's report as a table for people. Pure.

Duty: words and columns. Numbers are those of the JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from service.dry_run import Outcome
from service.dry_run_report import Counts, LookedAt, Report, RuleReport

WORDS: Final[Mapping[Outcome, str]] = {
    "forbidden": "executed action forbidden",
    "narrowed": "less to choose from",
    "fallback": "answered by the fallback",
    "stand_in": "answered by another version",
    "failed": "an expression failed",
    "monitored": "a monitoring rule objects",
}


def text_of(answer: Mapping[str, Any]) -> str:
    """Write a report, given as the service sends it."""
    report = msgspec.convert(answer, Report)
    lines = [_head(report), f"in force: {_rules(report.in_force)}; tested: {_rules(report.tested)}", ""]
    lines += _table(_changes(report), words=1)
    if report.rules:
        lines += ["", *_table(_counts(report.rules), words=3), *_details(report.rules)]
    notes = list(_notes(report))
    return "\n".join([*lines, "", *notes] if notes else lines)


def _head(report: Report) -> str:
    seen = report.looked_at
    if seen.first_ms is None or seen.last_ms is None:
        return f"{report.policy}: no decisions"
    between = f"{_time(seen.first_ms)} to {_time(seen.last_ms)} UTC"
    return f"{report.policy}: {_number(seen.decisions, 'decision')} of {_number(seen.keys, 'key')}, {between}"


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _rules(digest: str | None) -> str:
    return "no rules" if digest is None else digest[:12]


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _changes(report: Report) -> Iterator[Sequence[str]]:
    yield "decisions", "in force", "tested", "newly", "no longer"
    for each in report.changes:
        numbers = each.in_force, each.tested, each.newly, each.no_longer
        yield WORDS[each.outcome], *map(str, numbers)
    yield "mass that rules take", *(f"{mass:.4f}" for mass in report.masked_mass), "", ""


def _counts(rules: Sequence[RuleReport]) -> Iterator[Sequence[str]]:
    yield "rule (in force -> tested)", "kind", "mode", "forbids", "takes", "narrows", "failed"
    for rule in rules:
        pairs = (_pair(rule, name) for name in ("forbids", "takes", "narrows", "failed"))
        yield rule.name, rule.kind, rule.mode, *pairs


def _pair(rule: RuleReport, name: str) -> str:
    return " -> ".join("-" if found is None else str(getattr(found, name)) for found in (rule.in_force, rule.tested))


def _details(rules: Sequence[RuleReport]) -> Iterator[str]:
    """Reasons and examples of the rules that would have stepped in."""
    for rule in rules:
        found: Counts | None = rule.tested or rule.in_force
        if found is not None and found.examples:
            yield ""
            yield f"{rule.name}: {rule.reason or 'no reason given'}"
            yield from (f"  {each}" for each in found.examples)


def _table(rows: Iterator[Sequence[str]], words: int) -> Iterator[str]:
    """Columns side by side: the first ones are words, to the left, the others numbers, to the right."""
    kept = list(rows)
    widths = [max(len(row[column]) for row in kept) for column in range(len(kept[0]))]
    for row in kept:
        cells = enumerate(zip(row, widths, strict=True))
        yield "  ".join(cell.ljust(width) if at < words else cell.rjust(width) for at, (cell, width) in cells).rstrip()


def _notes(report: Report) -> Iterator[str]:
    seen: LookedAt = report.looked_at
    if report.in_force_refused is not None:
        yield f"The rules in force do not fit the policy, so the fallback answers everything: {report.in_force_refused}"
    if report.replayed:
        names = ", ".join(report.replayed)
        yield f"Replayed from these decisions alone, without anything that was executed before them: {names}."
    for count, what in (
        (seen.unloaded, "of versions that are not loaded any more: judged as the champion with their own outputs"),
        (seen.stood_in, "in which another version had answered already: that one was judged"),
        (seen.unanswered, "without an answer of the network: the fallback's in any case"),
        (seen.other_spaces, "of other spaces than the policy has now: left out"),
    ):
        if count:
            yield f"{_number(count, 'decision')} {what}."
    if seen.cut is not None:
        why = {"size": "they are too large", "time": "it took too long"}[seen.cut]
        yield f"Not as many as were asked for: {why}."
