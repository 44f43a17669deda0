"""Rollouts through a real service and a real Valkey: a better version walks to the top, a worse one straight back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.policies.networks import bundle_files, logarithm
from tests.service.admins import Admin, serving
from tests.service.rolling_out import Traffic
from tests.waiting import until

# Windows are short, so that tests are.
REWARD = {"window_s": 1.0, "range": [0.0, 1.0]}
PLAN = {
    "objective": "step", "steps": [0.2, 0.5], "shadow": False, "hold_s": 0, "min_units": 30, "unit_time_s": 1.0,
    "guards": {"return": {"margin": 0.1}},
}  # fmt: skip


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("rollouts")) as mine:
        yield mine


@pytest.fixture
def policy(admin: Admin, policy: str) -> str:
    """v1 always does 0; v2 always does 1."""
    admin.pushed(policy, "v1", prefers=0)
    admin.pushed(policy, "v2", prefers=1)
    answer = admin.deploy(policy, '"1"', champion="v1", reward=REWARD)
    assert answer.status_code == 200, answer.text
    return policy


def view(admin: Admin, policy: str) -> dict[str, Any]:
    answer = admin.http.get(f"/admin/policies/{policy}/rollout")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    assert answer.headers["etag"] == f'"{body["generation"]}"'
    return body


def planned(admin: Admin, policy: str, **changes: Any) -> None:
    tag = admin.http.get(f"/admin/policies/{policy}/rollout").headers["etag"]
    answer = admin.http.put(f"/admin/policies/{policy}/rollout", json=PLAN | changes, headers={"If-Match": tag})
    assert answer.status_code == 200, answer.text


def order(admin: Admin, policy: str, move: str, **body: Any) -> httpx.Response:
    return admin.http.post(f"/admin/policies/{policy}/rollout/{move}", json=body)


def ordered(admin: Admin, policy: str, move: str, **body: Any) -> dict[str, Any]:
    answer = order(admin, policy, move, **body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def stage(admin: Admin, policy: str) -> str:
    return str(view(admin, policy)["standing"]["stage"])


def test_a_better_version_walks_to_the_top_by_itself(admin: Admin, policy: str) -> None:
    planned(admin, policy)
    begun = ordered(admin, policy, "begin", version="v2")
    assert (begun["standing"]["stage"], begun["standing"]["weight"], begun["champion"]) == ("canary", 0.2, "v1")
    weights = set()
    with Traffic(admin, policy, worth=lambda action: 0.3 + 0.6 * action):

        def promoted() -> bool:
            now = view(admin, policy)
            weights.add(now["standing"]["weight"])
            return bool(now["standing"]["stage"] == "champion")

        until(promoted, "the promotion")
    after = view(admin, policy)
    assert (after["champion"], after["marks"]["v1"]["stage"]) == ("v2", "retired")
    assert weights == {0.2, 0.5, 0.0}
    assert "return" in after["standing"]["reason"]
    assert admin.act(policy)["version"] == "v2"
    log = admin.http.get("/admin/audit", params={"policy": policy}).json()["entries"]
    assert [each["action"] for each in log if each["actor"] == "system"][-2:] == ["advance", "promote"]


def test_a_worse_version_goes_straight_back_and_stays_there(admin: Admin, policy: str) -> None:
    planned(admin, policy)
    ordered(admin, policy, "begin", version="v2")
    with Traffic(admin, policy, worth=lambda action: 0.9 - 0.6 * action) as traffic:
        until(lambda: stage(admin, policy) == "quarantined", "the rollback")
        until(lambda: traffic.versions["v1"] > 0, "the champion's answers")
    after = view(admin, policy)
    assert (after["champion"], after["marks"]["v2"]["stage"]) == ("v1", "quarantined")
    assert "return" in after["marks"]["v2"]["reason"]
    refused = order(admin, policy, "begin", version="v2")
    assert (refused.status_code, refused.json()["code"]) == (409, "move_refused")
    deployed = admin.deploy(policy, f'"{after["generation"]}"', champion="v2", reward=REWARD)
    assert (deployed.status_code, deployed.json()["errors"][0]["field"]) == (422, "champion")
    ordered(admin, policy, "release", version="v2", reason="retrained")
    assert ordered(admin, policy, "begin", version="v2")["standing"]["stage"] == "canary"
    ordered(admin, policy, "withdraw")


def faulty(admin: Admin, policy: str) -> None:
    """v3 answers NaN where the others are well."""
    files = bundle_files(logarithm(), [[1.0, 1.0]], [[0.0, 0.0]], policy=policy, version="v3", exploration=None)
    assert admin.push(files, policy).status_code == 201


def odd(number: int, i: int) -> list[float]:
    return [-1.0, 2.0]


def test_a_shadow_that_trips_is_out_before_the_canary(admin: Admin, policy: str) -> None:
    faulty(admin, policy)
    planned(admin, policy, shadow=True, gate="advisory", hold_s=1)
    with Traffic(admin, policy, worth=lambda action: 0.5, states=odd):
        ordered(admin, policy, "begin", version="v3")
        until(lambda: stage(admin, policy) == "quarantined", "the way back")
    now = view(admin, policy)
    assert now["marks"]["v3"]["reason"].startswith("its shadow tripped")
    assert admin.view(policy)["shadows"] == []


def test_a_version_that_breaks_is_rolled_back_by_its_breaker_without_statistics(admin: Admin, policy: str) -> None:
    faulty(admin, policy)
    planned(admin, policy, min_units=10_000)
    with Traffic(admin, policy, worth=lambda action: 0.5, states=odd):
        ordered(admin, policy, "begin", version="v3")
        until(lambda: stage(admin, policy) == "quarantined", "the rollback")
    assert view(admin, policy)["marks"]["v3"]["reason"] == "its breaker tripped"
    log = admin.http.get("/admin/audit", params={"policy": policy}).json()["entries"]
    assert ("system", "roll_back") in [(each["actor"], each["action"]) for each in log]


def test_orders_by_hand_and_what_they_answer(admin: Admin, policy: str) -> None:
    planned(admin, policy, mode="manual", steps=[0.2, 0.5])
    for move, code in (("advance", 409), ("promote", 409), ("pause", 409), ("rollback", 409), ("weight", 409)):
        assert order(admin, policy, move, weight=0.5).status_code == code, move
    assert order(admin, policy, "begin").json()["errors"][0]["field"] == "version"
    assert order(admin, policy, "begin", version="v9").status_code == 404
    assert order(admin, policy, "begin", version="v1").json()["code"] == "move_refused"
    assert order(admin, policy, "somewhere").status_code == 422
    stale = admin.http.post(
        f"/admin/policies/{policy}/rollout/begin", json={"version": "v2"}, headers={"If-Match": '"1"'}
    )
    assert (stale.status_code, stale.json()["code"]) == (412, "generation_moved")
    begun = ordered(admin, policy, "begin", version="v2", reason="a try")
    assert (begun["standing"]["reason"], begun["behind"]) == ("a try", [])
    assert ordered(admin, policy, "pause", reason="lunch")["standing"]["paused"] == "lunch"
    assert ordered(admin, policy, "resume")["standing"]["paused"] == ""
    assert ordered(admin, policy, "weight", weight=0.3)["standing"]["floor"] == 0.2
    assert ordered(admin, policy, "advance")["standing"]["weight"] == 0.5
    assert order(admin, policy, "advance").json()["code"] == "move_refused"
    changed = admin.deploy(policy, f'"{view(admin, policy)["generation"]}"', champion="v2", reward=REWARD)
    assert (changed.status_code, changed.json()["code"]) == (409, "move_refused")
    promoted = ordered(admin, policy, "promote")
    assert (promoted["champion"], promoted["marks"]["v1"]["stage"]) == ("v2", "retired")
    back = ordered(admin, policy, "rollback", reason="customers complain")
    assert (back["champion"], back["marks"]["v2"]["reason"]) == ("v1", "customers complain")
    assert admin.act(policy)["version"] == "v1"
    missing = admin.http.put(f"/admin/policies/{policy}/rollout", json=PLAN)
    assert missing.status_code == 428
    wrong = admin.http.put(
        f"/admin/policies/{policy}/rollout", json=PLAN | {"alpha": 2}, headers={"If-Match": f'"{back["generation"]}"'}
    )
    assert (wrong.status_code, wrong.json()["errors"][0]["field"]) == (422, "alpha")


def test_the_audit_log_names_an_order_that_was_refused(admin: Admin, policy: str) -> None:
    for move, body in (("rollback", {}), ("quarantine", {"version": "v1"})):
        assert order(admin, policy, move, **body).status_code == 409
    page = admin.http.get("/admin/audit", params={"policy": policy, "limit": 100}).json()
    told = [(each["subject"], each["outcome"]) for each in page["entries"] if each["action"] == "rollout"]
    assert told == [("rollback", "move_refused"), ("quarantine v1", "move_refused")]


def test_what_a_champion_is_rolled_back_to_cannot_be_deleted(admin: Admin, policy: str) -> None:
    planned(admin, policy)
    for move in ("begin", "promote"):
        ordered(admin, policy, move, **({"version": "v2"} if move == "begin" else {}))
    refused = admin.delete(policy, "v1")
    assert (refused.status_code, refused.json()["code"]) == (409, "version_live")
    assert "rolled back" in refused.json()["detail"]
    assert ordered(admin, policy, "rollback")["champion"] == "v1"
    assert admin.act(policy)["version"] == "v1"


def test_what_is_pushed_is_rolled_out_by_itself_where_the_plan_says_so(admin: Admin, policy: str) -> None:
    planned(admin, policy, begin="pushed", hold_s=1_000)
    until(lambda: view(admin, policy)["standing"], "the rollout of v2")
    begun = view(admin, policy)["standing"]
    assert (begun["version"], begun["stage"], begun["reason"]) == ("v2", "canary", "pushed")
    admin.pushed(policy, "v4", prefers=1)
    ordered(admin, policy, "withdraw")
    until(lambda: view(admin, policy)["standing"]["version"] == "v4", "the rollout of v4")
    ordered(admin, policy, "rollback")
    assert admin.act(policy)["version"] == "v1"
