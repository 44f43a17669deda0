"""Rules tried on recorded decisions: pure, on records of the real pipeline, and through a running service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from policies.errors import SafetyError, Unavailable
from policies.types import ObservationSpec
from safety.document import read_rules
from safety.failing import Failing
from safety.rules import Bounds, Forbid
from service.clock import Clock, ManualClock
from service.decision import DecisionEvent, Event, RewardEvent, RewardFlags, decode_events, decode_record, encode_events
from service.dry_run import Trial
from service.dry_run_facts import Seen, Versions
from service.dry_run_report import Judged, Report, report
from service.dry_run_text import text_of
from service.metrics import Metrics
from service.plan import Plan, Row, Safeguards
from service.recent import FIRST_PAGE, Recent, recent_decisions
from service.redis_streams import RedisStreams, connect
from service.rehearsal import CHUNK, MOST_S, Rehearsal
from service.ruling import Ruling
from service.shipcall import ShipCall
from tests.policies.networks import linear, logarithm
from tests.service.admins import Admin, serving
from tests.service.pipelines import decider, plan, recorded, version
from tests.waiting import until

METRICS = Metrics(CollectorRegistry())
HEAD = "schema: 1\npolicy: {policy}\nrules:\n"
FACTORS = {"kind": "multi_discrete", "nvec": [2, 2], "factors": [{"name": "x", "names": ["l", "r"]}, {"name": "y"}]}
BOX = {"kind": "continuous", "low": [-1.0, -1.0], "high": [1.0, 2.0]}
FEATURES = {"shape": [2], "dtype": "float32", "features": [{"name": "cpu", "low": 0.0, "high": 10.0}, {"name": "rps"}]}
HOT = "{kind: forbid, name: hot, reason: too hot, when: 'state.cpu > 5.0 && action.name == \"a1\"'}"


def named(label: str = "v1", **changes: Any) -> Any:
    return version(METRICS, label, linear([[1, 0], [0, 1]]), **{"observation": FEATURES, "exploration": None} | changes)


def ruling(in_force: Plan, *rules: str) -> Ruling:
    source = HEAD.format(policy="toy") + "".join(f"- {rule}\n" for rule in rules)
    return Ruling.fitting(read_rules(source.encode()), in_force.versions["v1"].bundle)


def decisions(in_force: Plan, *rows: Row, rules: Ruling | None = None, apart_ms: int = 0) -> list[Seen]:
    """What the pipeline records of rows, each a batch of its own, so many milliseconds apart."""

    async def work() -> list[DecisionEvent]:
        with decider(in_force) as (pipeline, ledger, clock):
            pipeline.safeguards = Safeguards(ruling=rules)
            for row in rows:
                await pipeline.decide([row])
                clock.advance(apart_ms)
            return recorded(ledger)

    number = count(1)
    return [
        Seen.of(each.id, (each.at_ms, "w", 1, next(number)), each.action, each.state, decode_record(each.record))
        for each in asyncio.run(work())
    ]


def tried(in_force: Plan, seen: Sequence[Seen], *rules: str, before: Ruling | None = None) -> Report:
    """A report on all of these decisions."""
    versions, tested = Versions(in_force), ruling(in_force, *rules) if rules else None
    trials = [Judged(each, Trial(each, in_force, versions, seen)) for each in (before, tested)]
    half = len(seen) // 2
    for each in trials:
        for part in (range(half, len(seen)), range(half)):
            each.trial.judge(part)
    return report("toy", versions, seen, range(len(seen)), *trials)


def outcomes(found: Report) -> dict[str, int]:
    """How many of each outcome the tested rules have, but those with none."""
    return {each.outcome: each.tested for each in found.changes if each.tested}


def counts(found: Report, name: str) -> tuple[int, int, int, int]:
    """forbids, takes, narrows, failed of a tested rule."""
    tested = next(each.tested for each in found.rules if each.name == name)
    assert tested is not None
    return tested.forbids, tested.takes, tested.narrows, tested.failed


def test_an_executed_action_that_a_rule_forbids_is_counted_with_its_decision() -> None:
    in_force = plan({"v1": named()})
    seen = decisions(in_force, Row(state=[6.0, 9.0]), Row(state=[4.0, 9.0]), Row(state=[9.0, 6.0]))
    assert [each.action for each in seen] == [(1,), (1,), (0,)]
    found = tried(in_force, seen, HOT)
    assert outcomes(found) == {"forbidden": 1, "narrowed": 2}
    assert counts(found, "hot") == (1, 0, 2, 0)
    (rule,) = found.rules
    assert (rule.kind, rule.mode, rule.reason, rule.in_force) == ("forbid", "enforce", "too hot", None)
    assert rule.tested is not None
    assert rule.tested.examples == [seen[0].id]
    forbidden = found.changes[0]
    assert (forbidden.newly, forbidden.no_longer, forbidden.newly_ids) == (1, 0, [seen[0].id])
    assert found.masked_mass == pytest.approx((0.0, 1 / 3))
    assert (found.looked_at.decisions, found.looked_at.without_key, found.looked_at.keys) == (3, 3, 0)


def test_what_the_rules_in_force_did_is_shown_beside() -> None:
    in_force = plan({"v1": named()})
    old = ruling(in_force, HOT, "{kind: forbid, name: gone, when: 'state.rps > 100.0'}")
    seen = decisions(in_force, Row(state=[6.0, 9.0]), Row(state=[4.0, 9.0]), rules=old)
    assert [each.action for each in seen] == [(0,), (1,)]
    found = tried(in_force, seen, HOT.replace("5.0", "3.0"), before=old)
    assert (found.in_force, found.tested is None) == (old.ruleset.digest, False)
    forbidden, narrowed = found.changes[:2]
    assert (forbidden.in_force, forbidden.tested, forbidden.newly_ids) == (0, 1, [seen[1].id])
    assert (narrowed.in_force, narrowed.tested, narrowed.newly, narrowed.no_longer) == (1, 2, 1, 0)
    assert [(each.name, each.in_force is None, each.tested is None) for each in found.rules] == [
        ("hot", False, False),
        ("gone", False, True),
    ]
    lifted = tried(in_force, seen, before=old)
    assert (lifted.tested, outcomes(lifted)) == (None, {})
    assert (lifted.changes[1].no_longer, lifted.changes[1].no_longer_ids) == (1, [seen[0].id])


def test_rules_that_monitor_stand_apart() -> None:
    in_force = plan({"v1": named()})
    seen = decisions(in_force, Row(state=[6.0, 9.0]), Row(state=[12.0, 9.0]))
    watching = [HOT.replace("reason", "mode: monitor, reason"), "{kind: support, name: known, mode: monitor}"]
    found = tried(in_force, seen, *watching)
    assert outcomes(found) == {"monitored": 2}
    assert (counts(found, "hot"), counts(found, "known")) == ((1, 0, 2, 0), (0, 1, 0, 0))


def test_an_expression_that_fails_is_told_apart_from_one_that_is_true() -> None:
    in_force = plan({"v1": named()})
    contexts: list[dict[str, object] | None] = [None, {"hour": 9}, {"hour": 23}]
    rows = [Row(state=[1.0, 9.0], context=context) for context in contexts]
    late = "{kind: forbid, name: late, when: 'context.hour > 22 && action.index == 1'}"
    found = tried(in_force, decisions(in_force, *rows), late)
    assert outcomes(found) == {"forbidden": 2, "narrowed": 2, "failed": 1}
    assert counts(found, "late") == (2, 0, 2, 1)
    calm = "{kind: forbid, name: calm, when: 'state.cpu > 100.0 || context.hour > 24'}"
    assert counts(tried(in_force, decisions(in_force, *rows), calm), "calm") == (1, 0, 1, 1)


def test_a_rule_whose_evaluation_raises_has_failed_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from safety.support import SupportEvaluator

    in_force = plan({"v1": named()})
    seen = decisions(in_force, Row(state=[1.0, 9.0]), Row(state=[2.0, 9.0]))
    monkeypatch.delattr(SupportEvaluator, "judge")
    assert outcomes(tried(in_force, seen, "{kind: support, name: known}")) == {"fallback": 2, "failed": 2}


def test_a_declared_fallback_that_was_executed_is_not_held_against_a_rule() -> None:
    in_force = plan({"v1": named()})
    old = ruling(in_force, "{kind: forbid, name: all, when: 'state.cpu > 5.0'}")
    seen = decisions(in_force, Row(state=[6.0, 9.0]), rules=old)
    assert (seen[0].fallback, seen[0].action) == (True, (0,))
    found = tried(in_force, seen, "{kind: forbid, name: none, when: 'action.index == 0'}", before=old)
    assert outcomes(found) == {"narrowed": 1}
    fallback = found.changes[2]
    assert (fallback.outcome, fallback.in_force, fallback.tested, fallback.no_longer) == ("fallback", 1, 0, 1)


def test_decisions_would_go_to_the_fallback_or_to_another_version() -> None:
    alone, both = plan({"v1": named()}), plan({"v1": named(), "v0": named("v0")}, baseline="v0")
    sure = "{kind: confidence, name: sure, min_gap: 1.0}"
    for in_force, outcome in ((alone, "fallback"), (both, "stand_in")):
        seen = decisions(in_force, Row(state=[1.0, 1.1]), Row(state=[1.0, 5.0]))
        found = tried(in_force, seen, sure)
        assert (outcomes(found), counts(found, "sure")) == ({outcome: 1}, (0, 1, 0, 0))
    taken = decisions(both, Row(state=[1.0, 1.1]), rules=ruling(both, sure))
    assert (taken[0].version, taken[0].stood_in) == ("v0", True)
    found = tried(both, taken, sure)
    assert (outcomes(found), found.looked_at.stood_in) == ({}, 1)  # nobody stands in for the baseline


def test_for_a_challenger_the_champion_stands_in() -> None:
    in_force = plan({"v1": named(), "v2": named("v2")}, challenger="v2", weight=1.0)
    seen = decisions(in_force, Row(state=[1.0, 1.1]))
    assert seen[0].version == "v2"
    assert outcomes(tried(in_force, seen, "{kind: confidence, name: sure, min_gap: 1.0}")) == {"stand_in": 1}


def test_rules_on_exploration_are_held_against_explored_actions_only() -> None:
    in_force = plan({"v1": named(exploration={"epsilon": 0.5})})
    seen = decisions(in_force, *[Row(state=[1.0, 9.0])] * 20)
    explored = sum(each.explored and each.action == (1,) for each in seen)
    found = tried(in_force, seen, "{kind: never_explore, name: careful, actions: [a1]}")
    assert 0 < explored < 20
    assert (outcomes(found), counts(found, "careful")) == ({"forbidden": explored}, (explored, 0, 0, 0))


def test_limits_are_replayed_from_what_was_executed() -> None:
    in_force = plan({"v1": named()})
    rows = [Row(state=[1.0, 9.0], key=key) for key in ("a", "a", "b", "a", "a")]
    seen = decisions(in_force, *rows, apart_ms=1_000)
    by_key = "{kind: rate, name: by-key, actions: [a1], limit: 2, window_s: 3600}"
    found = tried(in_force, seen, by_key)
    assert (counts(found, "by-key"), found.replayed) == ((2, 0, 2, 0), ["by-key"])
    assert found.changes[0].newly_ids == [seen[3].id, seen[4].id]
    assert (found.looked_at.keys, found.looked_at.last_ms) == (2, seen[-1].at_ms)
    for rule, expected in (
        ("{kind: rate, name: r, actions: [a1], limit: 2, window_s: 3600, per: policy, scope: strict}", 3),
        ("{kind: rate, name: r, actions: [a1], limit: 1, window_s: 1.5, per: policy}", 4),
        ("{kind: rate, name: r, actions: [a1], limit: 1, window_s: 0.5}", 0),
        ("{kind: cooldown, name: r, actions: [a1], seconds: 1.5}", 2),
        ("{kind: cost, name: r, costs: {a1: 0.4}, cap: 1.0, window_s: 60, mode: monitor}", 2),
    ):
        assert counts(tried(in_force, seen, rule), "r") == (expected, 0, expected, 0)


def test_steps_are_taken_from_the_last_executed_action_of_a_key() -> None:
    in_force = plan({"v1": named()})
    rows = [Row(state=[*state], key="a") for state in ([1.0, 9.0], [9.0, 1.0], [8.0, 1.0])]
    seen = decisions(in_force, *rows, Row(state=[1.0, 9.0]), apart_ms=1)
    assert [each.action for each in seen] == [(1,), (0,), (0,), (1,)]
    step = "{kind: max_step, name: smooth, values: [0, 2], limit: 1, initial: a1, except_fallback: true}"
    found = tried(in_force, seen, step)
    # The second is too far from the first; the last has no key, so nothing is known of its past, and nothing is left.
    assert (outcomes(found), found.replayed) == ({"forbidden": 2, "narrowed": 4, "fallback": 1}, ["smooth"])
    assert found.changes[0].newly_ids == [seen[1].id, seen[3].id]


def test_a_joint_rule_looks_at_tuples() -> None:
    wide = linear([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    golden = [[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]
    factored = {"head": "q_values", "action": FACTORS, "fallback": ["l", 1], "exploration": None}
    in_force = plan({"v1": version(METRICS, "v1", wide, golden_outputs=golden, **factored)})
    seen = decisions(in_force, Row(state=[0.0, 5.0]), Row(state=[5.0, 0.0]), Row(state=[0.0, 5.0], context={"on": 1.5}))
    assert [each.action for each in seen] == [(1, 1), (0, 0), (1, 1)]
    pair = "{kind: forbid, name: pair, when: 'action.x.name == \"r\" && action.y.index == 1 && context.on > 1.0'}"
    one = "{kind: forbid, name: one, factor: x, when: 'action.index == 0 && 1 / int(state.f1) > 0'}"
    found = tried(in_force, seen, pair, one)
    assert counts(found, "pair") == (2, 0, 3, 2)
    assert counts(found, "one") == (1, 0, 1, 1)
    alone = tried(in_force, seen, one)
    assert (outcomes(alone), counts(alone, "one")) == ({"forbidden": 1, "narrowed": 1, "failed": 1}, (1, 0, 1, 1))
    early = one.replace("action.index == 0 &&", 'action.name == "r" &&')
    assert counts(tried(in_force, seen, early), "one") == (0, 0, 1, 1)


def test_points_are_held_against_boxes() -> None:
    box = version(METRICS, "v1", linear([[1, 0], [0, 1]]), head="action", action=BOX, fallback=[0, 0], exploration=None)
    in_force = plan({"v1": box})
    seen = decisions(in_force, Row(state=[0.9, 1.5]), Row(state=[0.1, 1.5]), Row(state=[0.9, 0.2]))
    found = tried(in_force, seen, "{kind: bounds, name: low, high: [0.25, null], when: 'state.f1 > 1.0'}")
    assert (outcomes(found), counts(found, "low")) == ({"forbidden": 1, "narrowed": 2}, (1, 0, 2, 0))
    assert found.masked_mass == pytest.approx((0.0, 1 / 3))
    shut = tried(in_force, seen, "{kind: forbid, name: shut, when: 'context.open != true'}")
    assert (outcomes(shut), shut.masked_mass) == ({"forbidden": 3, "narrowed": 3, "fallback": 3, "failed": 3}, (0, 0))


def test_a_network_that_had_failed_falls_back_whatever_rules_say() -> None:
    proto, golden = logarithm(), {"golden_states": [[1.0, 1.0]], "golden_outputs": [[0.0, 0.0]]}
    in_force = plan({"v1": version(METRICS, "v1", proto, **golden)})
    seen = decisions(in_force, Row(state=[-1.0, 1.0]))
    assert seen[0].fallback
    missing = [replace(seen[0], outputs=b"", outputs_dtype="<f8")]
    for each, unanswered in ((seen, 0), (missing, 1)):
        found = tried(in_force, each)
        assert (outcomes(found), found.looked_at.unanswered) == ({"fallback": 1}, unanswered)


def test_versions_that_are_gone_are_judged_with_their_own_outputs() -> None:
    probable: dict[str, Any] = {"head": "probabilities", "golden_states": [[0.0, 1.0]], "golden_outputs": [[0.0, 1.0]]}
    then, now = plan({"v1": named(**probable)}), plan({"v1": named()})
    seen = decisions(then, Row(state=[0.0, 1.0]), Row(state=[0.0, 1.0]))
    found = tried(now, seen, "{kind: forbid, name: other, when: 'action.index == 1'}")
    assert found.looked_at.unloaded == 2
    assert outcomes(found) == {"forbidden": 2, "narrowed": 2, "fallback": 2}  # no mass is left on the other action


def test_a_gone_versions_transform_is_kept() -> None:
    scaled = {"head": "action", "action": BOX, "fallback": [0, 0], "exploration": None}
    then = version(METRICS, "v1", linear([[1, 0], [0, 1]]), action_transform="unscale", **scaled)
    in_force = plan({"v1": version(METRICS, "v1", linear([[1, 0], [0, 1]]), **scaled)})
    seen = decisions(plan({"v1": then}), Row(state=[0.9, 0.0]))
    assert Versions(in_force).of(seen[0]).bundle.transform == "unscale"
    assert tried(in_force, seen, "{kind: bounds, name: low, high: [null, 0.25]}").masked_mass == (0.0, 1.0)


def test_decisions_of_other_spaces_do_not_fit() -> None:
    in_force = plan({"v1": named()})
    (one,) = decisions(in_force, Row(state=[1.0, 9.0]))
    versions = Versions(in_force)
    assert versions.fits(one)
    assert versions.fits(replace(one, outputs=b""))
    for other in (
        replace(one, kind="continuous"),
        replace(one, shape=(3,)),
        replace(one, action=(7,)),
        replace(one, outputs=one.outputs * 2),
    ):
        assert not versions.fits(other)


@pytest.mark.parametrize(
    ("state", "context", "fails"),
    [([1.0, 2.0], {"a": 1}, False), ([1.0, np.nan], {"a": 1}, True), ([1.0, 2.0], {"a": float("nan")}, True)],
)
def test_a_row_that_cannot_be_shown_fails(state: list[float], context: dict[str, object], fails: bool) -> None:
    bundle = named().bundle
    rule = Forbid(name="r", when="state.rps > 1.0 && context.a == 1")
    failing = Failing(rule, bundle.action, bundle.observation)
    assert failing.fails(np.array(state), context, [[0]]) is fails


def test_states_are_shown_whole_or_without_names_too() -> None:
    bundle, bare = named().bundle, ObservationSpec((2,))
    whole = Failing(Forbid(name="r", when="size(state) == 2"), bundle.action, bundle.observation)
    listed = Failing(Forbid(name="r", when="state[0] > 1.0"), bundle.action, bare)
    no_bool = Failing(Bounds(name="r", when="state[0]"), bundle.action, bare)
    for failing, fails in ((whole, False), (listed, False), (no_bool, True)):
        assert failing.fails(np.array([1.0, 2.0]), None, []) is fails


def test_a_key_to_stop_is_not_taken_for_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped:
        def execute(self, view: object) -> bool:
            raise KeyboardInterrupt

    bundle = named().bundle
    failing = Failing(Forbid(name="r", when="state.rps > 1.0"), bundle.action, bundle.observation)
    monkeypatch.setattr(failing, "_program", Stopped())
    with pytest.raises(KeyboardInterrupt):
        failing.fails(np.array([1.0, 2.0]), None, [])


# The table


def test_the_table_says_it_in_words() -> None:
    in_force = plan({"v1": named()})
    seen = decisions(in_force, Row(state=[6.0, 9.0], key="a"), Row(state=[4.0, 9.0], key="a"))
    rate = "{kind: rate, name: seldom, actions: [a1], limit: 1, window_s: 60}"
    found = tried(in_force, seen, HOT, rate, before=ruling(in_force, "{kind: support, name: gone}"))
    lines = text_of(msgspec.to_builtins(found)).splitlines()
    assert lines[0] == "toy: 2 decisions of 1 key, 2027-01-15 08:00:00 to 2027-01-15 08:00:00 UTC"
    assert lines[1] == f"in force: {str(found.in_force)[:12]}; tested: {str(found.tested)[:12]}"
    assert lines[4].split() == ["executed", "action", "forbidden", "0", "2", "2", "0"]
    assert [line.split() for line in lines if line.startswith(("hot ", "gone "))] == [
        ["hot", "forbid", "enforce", "-", "->", "1", "-", "->", "0", "-", "->", "1", "-", "->", "0"],
        ["gone", "support", "enforce", "0", "->", "-", "0", "->", "-", "0", "->", "-", "0", "->", "-"],
    ]
    assert lines[lines.index("hot: too hot") + 1] == f"  {seen[0].id}"
    assert lines[lines.index("seldom: no reason given") + 1] == f"  {seen[1].id}"
    assert lines[-1].startswith("Replayed from these decisions alone") and lines[-1].endswith(": seldom.")  # noqa: PT018


def test_the_table_says_what_was_not_looked_at() -> None:
    in_force = plan({"v1": named()})
    empty = report(
        "toy", Versions(in_force), [], [], *[Judged(None, Trial(None, in_force, Versions(in_force), []))] * 2
    )
    lines = text_of(msgspec.to_builtins(empty)).splitlines()
    assert (lines[:2], len(lines)) == (["toy: no decisions", "in force: no rules; tested: no rules"], 11)
    seen = msgspec.structs.replace(empty.looked_at, unloaded=1, stood_in=2, unanswered=3, other_spaces=4, cut="time")
    full = msgspec.structs.replace(empty, looked_at=seen, in_force_refused="odd")
    notes = text_of(msgspec.to_builtins(full)).splitlines()[12:]
    assert [note.split(" ")[:2] for note in notes] == [
        ["The", "rules"],
        ["1", "decision"],
        ["2", "decisions"],
        ["3", "decisions"],
        ["4", "decisions"],
        ["Not", "as"],
    ]


# Out of Redis


def shipped(url: str, policy: str, *events: Event, first: int = 1) -> None:
    async def work() -> None:
        async with contextlib.aclosing(RedisStreams(connect(url))) as streams:
            blobs = (encode_events(list(events)),)
            await streams.ship(ShipCall(policy, "w", 1, first, len(events), 0, 0, blobs=blobs))

    asyncio.run(work())


def recent(url: str, policy: str, last: int, most_bytes: int = 1 << 20) -> Recent[str]:
    async def work() -> Recent[str]:
        async with contextlib.aclosing(RedisStreams(connect(url))) as streams:
            return await recent_decisions(streams, policy, last, lambda each, *_: each, most_bytes)

    return asyncio.run(work())


def events_of(in_force: Plan, number: int) -> list[DecisionEvent]:
    async def work() -> list[DecisionEvent]:
        with decider(in_force) as (pipeline, ledger, clock):
            for _ in range(number):
                await pipeline.decide([Row(state=[1.0, 2.0])])
                clock.advance(1)
            blobs = [row.blob for row in ledger.register(in_force.policy).window]
            return [each for blob in blobs for each in decode_events(blob) if isinstance(each, DecisionEvent)]

    return asyncio.run(work())


def test_open_and_closed_decisions_are_read_each_once_in_order_of_time(valkey_url: str, policy: str) -> None:
    made = events_of(plan({"v1": named()}), 60)
    rewards = [
        RewardEvent(each.id, "", "digest", each.at_ms, each.due_ms, RewardFlags.FINAL, "", b"", "1.0", b"")
        for each in made[::3]
    ]
    shipped(valkey_url, policy, *made, *rewards)
    ids = [each.id for each in made]
    assert recent(valkey_url, policy, 1_000) == Recent(ids, cut=False)
    assert recent(valkey_url, policy, 60) == Recent(ids, cut=False)
    assert recent(valkey_url, policy, 10) == Recent(ids[-10:], cut=False)
    assert recent(valkey_url, f"{policy}-other", 10) == Recent([], cut=False)


def test_what_is_too_large_is_cut_off_and_said(valkey_url: str, policy: str) -> None:
    made = events_of(plan({"v1": named()}), 40)
    shipped(valkey_url, policy, *made)
    assert recent(valkey_url, policy, 40, most_bytes=2) == Recent([each.id for each in made][-FIRST_PAGE:], cut=True)


# In a worker


class Hurrying(ManualClock):
    """A clock on which three quarters of the time there is pass between two looks at it."""

    def monotonic_s(self) -> float:
        self.advance(int(MOST_S * 750))
        return super().monotonic_s()


def rehearsed(
    url: str, in_force: Plan, rules: str, *, standing: str = "", last: int = 1_000, clock: Clock | None = None
) -> Report:
    async def work() -> Report:
        async with contextlib.aclosing(RedisStreams(connect(url))) as streams:
            return await Rehearsal(streams, clock or ManualClock()).run(in_force, standing, rules, last)

    return asyncio.run(work())


def of_policy(policy: str) -> Plan:
    return replace(plan({"v1": named(policy=policy)}), policy=policy)


def test_judging_stops_in_time_with_the_newest(valkey_url: str, policy: str) -> None:
    in_force = of_policy(policy)
    made = events_of(in_force, CHUNK + 9)
    shipped(valkey_url, policy, *made)
    source = HEAD.format(policy=policy) + "- {kind: forbid, name: all, when: 'action.index == 1'}"
    whole = rehearsed(valkey_url, in_force, source)
    assert (whole.looked_at.decisions, whole.looked_at.cut, whole.changes[0].tested) == (CHUNK + 9, None, CHUNK + 9)
    part = rehearsed(valkey_url, in_force, source, clock=Hurrying())
    assert (part.looked_at.decisions, part.looked_at.cut, part.changes[0].tested) == (CHUNK, "time", CHUNK)
    assert part.looked_at.first_ms == made[9].at_ms


def test_rules_in_force_that_do_not_fit_are_named(valkey_url: str, policy: str) -> None:
    in_force = of_policy(policy)
    odd = HEAD.format(policy=policy) + "- {kind: forbid, name: odd, when: state.heat > 1.0}"
    found = rehearsed(valkey_url, in_force, "", standing=odd)
    assert "no feature 'heat'" in (found.in_force_refused or "")
    assert (found.in_force, found.tested, found.rules) == (None, None, [])
    with pytest.raises(SafetyError, match="no feature 'heat'"):
        rehearsed(valkey_url, in_force, odd)


def test_one_dry_run_at_a_time(valkey_url: str, policy: str) -> None:
    in_force = of_policy(policy)

    async def work() -> None:
        async with contextlib.aclosing(RedisStreams(connect(valkey_url))) as streams:
            rehearsal = Rehearsal(streams, ManualClock())
            first = asyncio.create_task(rehearsal.run(in_force, "", "", 10))
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="another dry run"):
                await rehearsal.run(in_force, "", "", 10)
            await first
            await rehearsal.run(in_force, "", "", 10)

    asyncio.run(work())


# Through the service


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("dry-run")) as mine:
        yield mine


def ask(admin: Admin, policy: str, *rules: str, last: int = 1_000) -> httpx.Response:
    source = HEAD.format(policy=policy) + "".join(f"- {rule}\n" for rule in rules)
    where = f"/admin/policies/{policy}/safety/test"
    return admin.http.post(where, params={"last": last}, content=source, headers={"Content-Type": "application/yaml"})


def looked_at(admin: Admin, policy: str, number: int) -> None:
    """Wait until so many decisions have reached Redis."""
    where = f"/admin/policies/{policy}/safety/test"
    until(lambda: admin.http.post(where).json()["looked_at"]["decisions"] == number, "the decisions")


def test_rules_are_tried_on_what_the_service_has_decided(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1", prefers=1)
    answers = [admin.act(policy, key=key, context={"hour": hour}) for hour, key in enumerate("aabab")]
    batch = {"policy": policy, "states": [[1.0, 2.0]] * 3, "keys": ["a", "b", "c"]}
    assert admin.http.post("/v1/act/batch", json=batch).json()["action"] == [1, 1, 1]
    admin.http.post("/v1/reward", json={"decision_id": answers[0]["decision_id"], "reward": 1.0}).raise_for_status()
    looked_at(admin, policy, 8)
    late = "{kind: forbid, name: late, reason: It is late, when: 'context.hour > 2 && action.index == 1'}"
    rate = "{kind: rate, name: rare, actions: [a1], limit: 2, window_s: 3600, mode: monitor}"
    found = ask(admin, policy, late, rate).json()
    by_outcome = {each["outcome"]: each for each in found["changes"]}
    assert by_outcome["forbidden"]["tested"] == 5  # two by the hour, three whose callers left it out
    assert by_outcome["failed"]["tested"] == 3
    assert set(by_outcome["forbidden"]["newly_ids"]) > {answers[3]["decision_id"], answers[4]["decision_id"]}
    assert by_outcome["monitored"]["tested"] == 3  # the third and the fourth of `a`, the third of `b`
    assert found["replayed"] == ["rare"]
    assert (found["rules"][0]["reason"], found["rules"][0]["in_force"]) == ("It is late", None)
    assert ask(admin, policy, late, last=3).json()["looked_at"]["decisions"] == 3
    assert admin.http.get(f"/admin/policies/{policy}/safety").text == ""  # nothing was changed
    assert admin.act(policy)["action"] == 1


def test_rules_in_force_are_compared_with(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1", prefers=1)
    never = "{kind: forbid, name: never, when: 'action.index == 1'}"
    headers = {"If-Match": '"1"'}
    source = HEAD.format(policy=policy) + f"- {never}\n"
    assert admin.http.put(f"/admin/policies/{policy}/safety", content=source, headers=headers).status_code == 200
    assert admin.act(policy)["action"] == 0
    looked_at(admin, policy, 1)
    found = admin.http.post(f"/admin/policies/{policy}/safety/test", content=b"").json()
    by_outcome = {each["outcome"]: (each["in_force"], each["tested"], each["no_longer"]) for each in found["changes"]}
    assert (by_outcome["forbidden"], by_outcome["narrowed"]) == ((0, 0, 0), (1, 0, 1))
    assert (len(found["in_force"]), found["tested"], found["masked_mass"]) == (64, None, [1.0, 0.0])


def test_what_cannot_be_tried_is_refused(admin: Admin, policy: str) -> None:
    assert ask(admin, policy).json()["code"] == "unknown_policy"
    admin.pushed(policy, "v1", prefers=1)
    wrong = ask(admin, policy, "{kind: rate, name: r, actions: [a7], limit: 1, window_s: 1}").json()
    (error,) = wrong["errors"]
    assert (wrong["code"], error["field"], error["line"]) == ("invalid_safety", "rules[0].actions[0]", 4)
    many = ask(admin, policy, last=100_001).json()
    assert (many["code"], many["errors"][0]["field"]) == ("invalid_field", "query.last")
    unauthorized = httpx.post(f"{admin.server.url}/admin/policies/{policy}/safety/test", content=b"")
    assert unauthorized.status_code == 401
