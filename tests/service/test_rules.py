"""Rules in the pipeline and through the service: who answers, what is recorded, limits across replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from safety.document import read_rules
from service.decision import decode_record
from service.history import replay
from service.limits import Limits
from service.metrics import Metrics
from service.plan import Plan, Row, Safeguards
from service.redis_streams import RedisStreams, connect
from service.ruling import Ruling
from service.valkey import EmbeddedValkey
from service.wire import ActResponse
from tests.policies.networks import linear
from tests.service.admins import Admin, serving
from tests.service.pipelines import KEYS, decider, plan, recorded, version
from tests.service.valkeys import SMALL
from tests.waiting import until

METRICS = Metrics(CollectorRegistry())
HEAD = "schema: 1\npolicy: {policy}\nrules:\n"
BOX = {"kind": "continuous", "low": [-1.0, -1.0], "high": [1.0, 2.0]}
FACTORS = {"kind": "multi_discrete", "nvec": [2, 2], "factors": [{"name": "x", "names": ["l", "r"]}, {"name": "y"}]}


def ruled(in_force: Plan, *rules: str, policy: str = "toy") -> Safeguards:
    source = HEAD.format(policy=policy) + "".join(f"- {rule}\n" for rule in rules)
    ruling = Ruling.fitting(read_rules(source.encode()), in_force.versions["v1"].bundle)
    return Safeguards(ruling=ruling)


def decided(in_force: Plan, safeguards: Safeguards, *rows: Row) -> list[tuple[ActResponse, Any]]:
    """Answers and records, each of which is replayed."""

    async def work() -> list[tuple[ActResponse, Any]]:
        with decider(in_force) as (pipeline, ledger, _):
            pipeline.safeguards = safeguards
            answers = await pipeline.decide(list(rows))
            events = recorded(ledger)
            records = [decode_record(event.record) for event in events]
            for event, record in zip(events, records, strict=True):
                if record.propensity_reason is None:
                    again = replay(event.id, event.mask, record, KEYS.signing.draw)
                    assert (again.explored, again.propensity) == (record.explored, record.propensity)
            return list(zip(answers, records, strict=True))  # type: ignore[arg-type]

    return asyncio.run(work())


def named(label: str = "v1", **changes: Any) -> Any:
    features = [{"name": "cpu", "low": 0.0, "high": 10.0}, {"name": "rps"}]
    observation = {"shape": [2], "dtype": "float32", "features": features}
    return version(METRICS, label, linear([[1, 0], [0, 1]]), observation=observation, **changes)


def test_a_forbidden_action_is_never_drawn_and_the_rule_is_named() -> None:
    in_force = plan({"v1": named()})
    rules = ruled(in_force, "{kind: forbid, name: hot, when: 'state.cpu > 5.0 && action.name == \"a1\"'}")
    ((hot, record),) = decided(in_force, rules, Row(state=[6.0, 9.0], explore=False))
    assert (hot.action, hot.propensity, hot.safety.overridden, hot.safety.rules) == (0, 1.0, True, ("hot",))
    assert len(record.rules_digest) == 64
    ((cold, _),) = decided(in_force, rules, Row(state=[4.0, 9.0], explore=False))
    assert (cold.action, cold.safety.overridden) == (1, False)


def test_a_rule_that_monitors_changes_nothing_and_is_recorded() -> None:
    in_force = plan({"v1": named()})
    rules = ruled(in_force, "{kind: forbid, name: hot, mode: monitor, when: 'state.cpu > 5.0'}")
    ((answer, record),) = decided(in_force, rules, Row(state=[6.0, 9.0], explore=False))
    assert (answer.action, answer.safety.rules, record.monitored) == (1, (), ("hot",))


def test_a_rule_that_fails_denies() -> None:
    in_force = plan({"v1": named()})
    rules = ruled(in_force, "{kind: forbid, name: hour, when: 'context.hour > 22.0'}")
    ((answer, _),) = decided(in_force, rules, Row(state=[1.0, 2.0]))
    assert (answer.fallback, answer.action) == ("nothing_allowed", 0)
    ((late, _),) = decided(in_force, rules, Row(state=[1.0, 2.0], context={"hour": 9.0}, explore=False))
    assert (late.fallback, late.action) == (None, 1)


def with_baseline() -> Plan:
    return plan({"v1": named(), "v0": named("v0")}, baseline="v0")


def test_rules_hand_rows_to_the_baseline_and_others_of_the_batch_stay() -> None:
    in_force = with_baseline()
    rules = ruled(in_force, "{kind: confidence, name: sure, min_gap: 1.0}")
    (unsure, _), (sure, _) = decided(in_force, rules, Row(state=[1.0, 1.1]), Row(state=[1.0, 5.0]))
    assert (unsure.version, unsure.role, unsure.safety.stand_in) == ("v0", "baseline", "rule:sure")
    assert (unsure.action, unsure.exploration.epsilon, unsure.propensity) == (1, 0.0, 1.0)
    assert (sure.version, sure.safety.stand_in) == ("v1", None)


def test_states_outside_of_training_fall_back() -> None:
    in_force = with_baseline()
    rules = ruled(in_force, "{kind: support, name: known}")
    ((outside, _),) = decided(in_force, rules, Row(state=[11.0, 1.0]))
    assert (outside.fallback, outside.action, outside.safety.rules) == ("rule", 0, ("known",))
    ((inside, _),) = decided(in_force, rules, Row(state=[9.0, 1.0], explore=False))
    assert inside.fallback is None


def test_what_is_left_empty_goes_where_the_rules_say() -> None:
    in_force = with_baseline()
    everything = "{kind: forbid, name: nothing, when: 'state.cpu > 5.0', on_empty: baseline}"
    ((answer, _),) = decided(in_force, ruled(in_force, everything), Row(state=[6.0, 9.0]))
    assert (answer.version, answer.fallback) == ("v0", "nothing_allowed")  # the rule holds for the baseline, too
    partly = "{kind: forbid, name: some, when: 'state.cpu > 5.0 && action.index == 1', on_empty: baseline}"
    one_hot = plan({"v1": named(head="probabilities", golden_states=[[0.0, 1.0]], golden_outputs=[[0.0, 1.0]])})
    ((alone, _),) = decided(one_hot, ruled(one_hot, partly), Row(state=[0.0, 1.0], explore=False))
    assert alone.fallback is None


def test_no_target_mass_left_hands_over_too() -> None:
    probable = named(head="probabilities", golden_states=[[0.0, 1.0]], golden_outputs=[[0.0, 1.0]])
    in_force = plan({"v1": probable, "v0": named("v0")}, baseline="v0")
    rule = "{kind: forbid, name: some, when: 'action.index == 1', on_empty: baseline}"
    ((answer, _),) = decided(in_force, ruled(in_force, rule), Row(state=[0.0, 1.0]))
    assert (answer.version, answer.safety.stand_in, answer.action) == ("v0", "no_mass_allowed", 0)


def test_exploration_keeps_to_what_it_may() -> None:
    in_force = plan({"v1": named(exploration={"epsilon": 1.0})})
    rules = ruled(in_force, "{kind: never_explore, name: careful, actions: [a0]}")
    rows = [Row(state=[1.0, 2.0], include=("distribution",)) for _ in range(20)]
    assert {(answer.action, answer.propensity) for answer, _ in decided(in_force, rules, *rows)} == {(1, 1.0)}
    barred = ruled(in_force, "{kind: never_explore, name: careful, actions: [a0, a1]}")
    ((answer, _),) = decided(in_force, barred, Row(state=[1.0, 2.0]))
    assert (answer.exploration.epsilon, answer.action) == (0.0, 1)


def test_a_joint_rule_decides_over_tuples() -> None:
    wide = linear([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    golden = [[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]
    in_force = plan(
        {"v1": version(METRICS, "v1", wide, golden_outputs=golden, head="logits", action=FACTORS, fallback=["l", 1])}
    )
    rules = ruled(in_force, "{kind: forbid, name: pair, when: 'action.x.index == 1 && action.y.index == 1'}")
    rows = [Row(state=[0.0, 5.0], include=("distribution",)) for _ in range(30)]
    for answer, record in decided(in_force, rules, *rows):
        assert answer.action != [1, 1]
        assert isinstance(answer.distribution, list)
        assert len(answer.distribution) == 4
        assert answer.distribution[3] == 0.0
        assert answer.propensity == pytest.approx(answer.distribution[2 * answer.action[0] + answer.action[1]])  # type: ignore[index]
        assert list(record.joint_mask) == [1, 1, 1, 0]
        assert len(record.behaviour) == len(record.target) == 4 * 8


def test_points_keep_to_the_rules_box() -> None:
    box = version(METRICS, "v1", linear([[1, 0], [0, 1]]), head="action", action=BOX, fallback=[0, 0], exploration=None)
    in_force = plan({"v1": box})
    rules = ruled(in_force, "{kind: bounds, name: low, high: [0.25, null]}")
    ((answer, _),) = decided(in_force, rules, Row(state=[0.9, 1.5]))
    assert (answer.action, answer.safety.rules, answer.propensity) == ([0.25, 1.5], ("low",), 1.0)


def test_a_mistake_of_the_evaluators_is_seen_by_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    from safety.forbid import ForbidEvaluator

    monkeypatch.setattr(ForbidEvaluator, "judge", lambda self, facts: None)
    in_force = plan({"v1": named()})
    rules = ruled(in_force, "{kind: forbid, name: hot, when: 'action.index == 1'}")
    ((answer, record),) = decided(in_force, rules, Row(state=[1.0, 2.0], explore=False))
    assert (answer.action, answer.fallback, answer.propensity) == (0, "check_failed", None)
    assert record.propensity_reason == "check_failed"


def test_rows_of_one_key_in_a_batch_are_decided_one_after_the_other() -> None:
    in_force = plan({"v1": named()})
    limit = "{kind: max_step, name: step, limit: 1, values: [0, 1], initial: a0, scope: local, except_fallback: true}"
    ruling = ruled(in_force, limit).ruling
    assert ruling is not None

    async def work() -> None:
        with decider(in_force) as (pipeline, _, clock):
            limits = Limits(RedisStreams(connect("redis://127.0.0.1:1")), "toy", clock)  # never asked: all is local
            limits.configure(ruling.limits)
            pipeline.safeguards = Safeguards(ruling=ruling, limits=limits)
            rows = [Row(state=[1.0, 2.0], key=key, explore=False) for key in ("k", "other", "k", "k")]
            answers = await pipeline.decide(rows)
            assert [(a.action, a.fallback) for a in answers if isinstance(a, ActResponse)] == [(1, None)] * 4

    asyncio.run(work())


def test_rules_that_count_deny_where_nobody_counts() -> None:
    in_force = plan({"v1": named()})
    rules = ruled(in_force, "{kind: rate, name: seldom, actions: [a1], limit: 1, window_s: 60}")
    ((answer, _),) = decided(in_force, rules, Row(state=[1.0, 2.0], key="k", explore=False))
    assert (answer.action, answer.safety.rules) == (0, ("seldom",))


# Through the service


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("rules")) as mine:
        yield mine


def put(admin: Admin, policy: str, *rules: str) -> httpx.Response:
    tag = admin.http.get(f"/admin/policies/{policy}/safety").headers["etag"]
    source = HEAD.format(policy=policy) + "".join(f"- {rule}\n" for rule in rules)
    headers = {"If-Match": tag, "Content-Type": "application/yaml"}
    return admin.http.put(f"/admin/policies/{policy}/safety", content=source, headers=headers)


def test_rules_are_put_read_in_force_and_removed(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1", prefers=1)
    assert admin.http.get(f"/admin/policies/{policy}/safety").text == ""
    assert put(admin, policy, "{kind: forbid, name: never, when: 'action.index == 1'}").status_code == 200
    answer = admin.act(policy)
    assert (answer["action"], answer["safety"]["rules"]) == (0, ["never"])
    assert "kind: forbid" in admin.http.get(f"/admin/policies/{policy}/safety").text
    where = f"/v1/decisions/{answer['decision_id']}"
    until(lambda: admin.http.get(where).status_code == 200, "the record")
    assert len(admin.http.get(where).json()["why"]["rules_digest"]) == 64
    empty = admin.http.put(f"/admin/policies/{policy}/safety", content=b"", headers={"If-Match": '"2"'})
    assert empty.status_code == 200
    assert admin.act(policy)["action"] == 1


def test_rules_are_refused_by_line_and_column_and_field(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1", prefers=1)
    wrong = put(admin, policy, "{kind: forbid, name: never, when: 'action.index == 1'}", "{kind: rate, name: never}")
    body = wrong.json()
    assert (wrong.status_code, body["code"]) == (422, "invalid_safety")
    assert {(each["field"], each["line"]) for each in body["errors"]} >= {("rules[1].actions", 5)}
    unknown = put(admin, policy, "{kind: rate, name: r, actions: [a7], limit: 1, window_s: 1}")
    (error,) = unknown.json()["errors"]
    assert (error["field"], error["line"]) == ("rules[0].actions[0]", 4)
    forbidding = put(admin, policy, "{kind: rate, name: r, actions: [a0], limit: 1, window_s: 1}")
    assert "fallback" in forbidding.json()["detail"]
    assert admin.act(policy)["action"] == 1


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    mine = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=SMALL)
    yield mine
    mine.stop()


def follows(replica: Admin, policy: str, rule: str) -> bool:
    """Whether a replica serves a policy with a rule."""
    seen = replica.http.get(f"/admin/policies/{policy}")
    served = seen.status_code == 200 and seen.json()["champion"] is not None
    return served and rule in replica.http.get(f"/admin/policies/{policy}/safety").text


def test_limits_hold_across_replicas_and_deny_without_redis(
    tmp_path: Path, policy: str, shared: EmbeddedValkey
) -> None:
    url = shared.start()
    with serving(tmp_path / "one", redis_url=url) as one, serving(tmp_path / "two", redis_url=url) as two:
        one.pushed(policy, "v1", prefers=1)
        by_key = "{kind: rate, name: by-key, actions: [a1], limit: 3, window_s: 3600}"
        assert put(one, policy, by_key).status_code == 200
        until(lambda: follows(two, policy, "by-key"), "the other replica")
        taken = [replica.act(policy, key="k")["action"] for _ in range(4) for replica in (one, two)]
        assert sum(taken) == 3
        assert one.act(policy, key="other")["action"] == 1
        answers = one.http.post(
            "/v1/act/batch", json={"policy": policy, "states": [[1.0, 2.0]] * 6, "keys": ["batch"] * 6}
        ).json()
        assert sum(answers["action"]) == 3
        shared.stop()
        denied = one.act(policy, key="third")
        assert (denied["action"], denied["safety"]["rules"]) == (0, ["by-key"])
        shared.start()
        until(lambda: one.act(policy, key="third")["action"] == 1, "limits after Redis is back")


def test_a_policys_limit_is_leased_to_replicas(tmp_path: Path, policy: str, shared: EmbeddedValkey) -> None:
    url = shared.start()
    with serving(tmp_path / "one", redis_url=url) as one, serving(tmp_path / "two", redis_url=url) as two:
        one.pushed(policy, "v1", prefers=1)
        rule = "{kind: rate, name: all, actions: [a1], limit: 20, window_s: 3600, per: policy}"
        assert put(one, policy, rule).status_code == 200
        until(lambda: follows(two, policy, "all"), "the other replica")
        counted = 0

        def some(admin: Admin) -> bool:
            nonlocal counted
            counted += int(admin.act(policy)["action"])
            return counted >= 15

        until(lambda: some(one) or some(two), "three quarters of the limit")
        for _ in range(100):
            some(one)
            some(two)
        assert 15 <= counted <= 20


def test_the_callers_previous_action_serves_rules_on_steps() -> None:
    in_force = plan({"v1": named()})
    rule = "{kind: max_step, name: small, limit: 0.5, values: [0.0, 1.0], except_fallback: true}"
    rules = ruled(in_force, rule)
    ((unknown, _),) = decided(in_force, rules, Row(state=[1.0, 2.0]))
    assert unknown.fallback == "nothing_allowed"  # nobody knows the key's past
    ((stays, _),) = decided(in_force, rules, Row(state=[1.0, 2.0], previous=(0,)))
    assert (stays.action, stays.fallback, stays.safety.rules) == (0, None, ("small",))
    ((goes, _),) = decided(in_force, rules, Row(state=[1.0, 2.0], previous=(1,), explore=False))
    assert (goes.action, goes.fallback, goes.safety.rules) == (1, None, ())


def test_previous_actions_are_read_and_refused_by_field(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1", prefers=1)
    rule = "{kind: max_step, name: small, limit: 0.5, values: [0.0, 1.0], except_fallback: true}"
    assert put(admin, policy, rule).status_code == 200
    assert admin.act(policy, previous_action="a1")["action"] == 1
    assert admin.act(policy, previous_action=0)["action"] == 0
    rows = {"policy": policy, "states": [[1.0, 2.0]] * 2, "previous_actions": ["a1", 0]}
    assert admin.http.post("/v1/act/batch", json=rows).json()["action"] == [1, 0]
    wrong = admin.http.post("/v1/act/batch", json=rows | {"previous_actions": [0, "a9"]})
    assert (wrong.status_code, wrong.json()["errors"][0]["field"]) == (422, "previous_actions[1]")


def test_removed_rules_give_back_what_they_held(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1", prefers=1)
    rule = "{kind: rate, name: few, actions: [a1], limit: 5, window_s: 3600, per: policy}"
    assert put(admin, policy, rule).status_code == 200
    until(lambda: admin.act(policy)["action"] == 1, "a portion")
    tag = admin.http.get(f"/admin/policies/{policy}/safety").headers["etag"]
    removed = admin.http.put(f"/admin/policies/{policy}/safety", content=b"", headers={"If-Match": tag})
    assert removed.status_code == 200
    assert {admin.act(policy)["action"] for _ in range(10)} == {1}
