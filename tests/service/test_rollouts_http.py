"""Rollouts through a real service and a real Valkey: a better version walks to the top, a worse one straight back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

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
