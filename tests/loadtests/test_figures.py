"""From samples to what is shown: quantiles, medians, ratios within a repetition, targets, tables."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from loadtests import report
from loadtests.cases import GROUPS, chosen
from loadtests.latency import Latency
from loadtests.results import Row, references
from loadtests.targets import ROWS, TARGETS, Verdict, verdicts


def row(name: str, *samples: dict[str, float]) -> Row:
    return Row(name, f"measure {name}", list(samples))


def rows(*found: Row) -> dict[str, Row]:
    return {each.name: each for each in found}


def test_quantiles_are_latencies_that_somebody_met() -> None:
    found = Latency.of([k / 1e6 for k in range(1000, 0, -1)])
    assert (found.count, found.p50_us, found.p99_us, found.p999_us, found.max_us) == pytest.approx(
        (1000, 500, 990, 999, 1000)
    )
    assert Latency.of([0.25]).p999_us == 250_000
    assert Latency.of([]) == Latency()


def test_a_ratio_is_the_median_of_ratios_within_repetitions() -> None:
    """The machine slows down tenfold in the second repetition, which meets both; the medians' ratio would say 2."""
    mine = row("g/a/c", {"per_s": 100.0}, {"per_s": 10.0}, {"per_s": 90.0})
    theirs = row("g/b/c", {"per_s": 200.0}, {"per_s": 20.0}, {"per_s": 45.0})
    assert mine.ratio(theirs) == 0.5
    assert mine.more(theirs, "per_s") == -10.0
    assert mine.median("per_s") == 90.0
    assert mine.spread("per_s") == 0.5


def test_what_was_not_measured_is_none_and_not_zero() -> None:
    once, other = row("g/a/c", {"per_s": 5.0}), row("g/b/c", {"ready_s": 1.0})
    assert once.spread("per_s") is None
    assert once.median("ready_s") is None
    assert once.ratio(other) is None
    assert row("g/c/c").ratio(once) is None


def test_a_row_is_held_against_the_same_load_and_not_against_itself() -> None:
    found = rows(row("g/a/c1"), row("g/b/c1"), row("g/b/c16"), row("h/a/c1"))
    assert references("g/b/c1", ("a", "b"), found) == {"a": found["g/a/c1"]}
    assert references("g/b/c16", ("a",), found) == {}


def test_every_target_is_about_rows_that_exist() -> None:
    """Each target finds its figure among all rows with all figures."""
    figures = {"per_s": 1.0, "p50_us": 1.0, "service_p99_us": 1.0, "goodput": 1.0, "cpu_us": 1.0, "ready_s": 1.0}
    everything = rows(*(row(each.name, {**figures, "peak_mb": 1.0}) for group in GROUPS for each in group.entries))
    assert [each.what for each in verdicts(everything) if each.found is None] == []
    assert {each.reached for each in verdicts({})} == {None}
    assert len(verdicts({})) == len(TARGETS)


ALL_FIGURES = dict.fromkeys(("per_s", "p50_us", "service_p99_us", "goodput", "cpu_us", "ready_s", "peak_mb"), 1.0)


def test_the_rows_of_targets_are_those_they_need_and_no_others() -> None:
    chosen_names = {entry.name for group in chosen(ROWS) for entry in group.entries}
    assert chosen_names == set(ROWS)
    everything = rows(*(row(name, ALL_FIGURES) for name in ROWS))
    assert [each.what for each in verdicts(everything) if each.found is None] == []
    for name in ROWS:
        without = {each: found for each, found in everything.items() if each != name}
        assert [each for each in verdicts(without) if each.found is None], f"{name} is needed by no target"


def test_several_runs_stand_side_by_side_and_one_miss_is_a_miss() -> None:
    def run(found: float | None, reached: bool | None) -> list[Verdict]:
        return [Verdict("speed", "at least 2 ×", found, reached), Verdict("never", "at least 1 ×", None, None)]

    assert report.runs_table([run(2.5, True), run(1.5, False), run(3.0, True)]).splitlines()[1].split() == [
        *("speed", "at", "least", "2", "×", "2.5", "1.5", "3", "FAIL"),
    ]  # fmt: skip
    assert report.runs_table([run(2.5, True), run(3.0, True)]).endswith("pass")
    assert report.runs_table([run(2.5, True), run(None, None)]).endswith("not measured")
    assert "never" not in report.runs_table([run(2.5, True)])


@pytest.mark.parametrize(("per_s", "reached"), [(45.0, True), (44.9, False)])
def test_a_target_is_reached_at_its_limit(per_s: float, reached: bool) -> None:
    found = rows(row("base/surefoot/c16", {"per_s": per_s}), row("base/empty/c16", {"per_s": 100.0}))
    assert verdicts(found)[0].reached is reached


@pytest.mark.parametrize(("p50_us", "reached"), [(350.0, True), (350.1, False)])
def test_a_target_of_most_is_one_of_most(p50_us: float, reached: bool) -> None:
    found = rows(row("base/surefoot/c1", {"p50_us": p50_us}), row("base/empty/c1", {"p50_us": 100.0}))
    (verdict,) = [each for each in verdicts(found) if each.found is not None]
    assert verdict.reached is reached
    assert verdict.found == pytest.approx(p50_us - 100.0)


def test_the_tables_tell_rows_ratios_commands_and_what_speaks_against_them() -> None:
    found = rows(
        row("base/empty/c16", {"per_s": 10_000.0, "cpu_us": 50.0}),
        row("base/surefoot/c16", {"per_s": 2_500.0, "cpu_us": 200.0, "refused": 3.0, "elsewhere": 0.5, "late": 0.2}),
    )
    shown = report.tables(GROUPS, found)
    assert "0.25 empty" in shown
    assert "4.00 empty" in shown
    assert "    measure base/surefoot/c16\n" in shown
    assert "3 refused; BUSY: others took 0.5 cores; 20% sent late" in shown
    assert "durability" not in shown, "a group without figures is left out"
    assert "FAIL" in report.verdicts_table("target", verdicts(found))


def test_the_document_holds_every_repetition() -> None:
    samples: Sequence[dict[str, float]] = ({"per_s": 10.0}, {"per_s": 20.0})
    found = rows(row("base/empty/c16", *samples), row("base/surefoot/c16", *({"per_s": 5.0},) * 2))
    written = json.loads(json.dumps(report.document({"cores": 2}, GROUPS, found, verdicts(found))))
    assert written["rows"][0]["repetitions"] == list(samples)
    assert written["rows"][1]["ratio"] == {"empty": 0.375}
    assert written["targets"][0]["reached"] is False


def test_names_choose_rows() -> None:
    def names(*only: str, quick: bool = False) -> set[str]:
        return {entry.name for group in chosen(only, quick=quick) for entry in group.entries}

    everything = names()
    assert names("base/surefoot/c16") == {"base/surefoot/c16"}
    assert names("base/surefoot") == {each for each in everything if each.startswith("base/surefoot/")}
    assert names("base/*/c1") == {f"base/{each}/c1" for each in ("empty", "fastapi", "surefoot")}
    assert names("rules", "start") == {each for each in everything if each.startswith(("rules/", "start/"))}
    assert names(quick=True) < everything
    assert names("base/empty/c256", quick=True) == {"base/empty/c256"}
    peers = {entry.spec.kind for group in chosen(["peers"], installed=["litserve"]) for entry in group.entries}
    assert peers == {"fastapi", "surefoot", "litserve"}
    assert not any("litserve" in each for each in everything), "it is not installed"
    with pytest.raises(ValueError, match="bas is no row"):
        chosen(["bas"])


def test_a_row_has_one_name() -> None:
    found = [entry.name for group in GROUPS for entry in group.entries]
    assert len(found) == len(set(found))
    assert all(name.count("/") == 2 for name in found)
