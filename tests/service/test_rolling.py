"""Rollout and deployment never disagree, whatever is ordered in whichever order; what is refused changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from policies.deployment import Challenger, Deployment, RewardPolicy
from policies.errors import InvalidField, MoveRefused, SurefootError
from service.document import Document, Mark
from service.rolling import (
    after_trips,
    barred,
    begun,
    followed,
    forgotten,
    made,
    next_version,
    paused,
    quarantined,
    redeployed,
    released,
    resumed,
    salt_of,
    weighed,
)
from shadow.rollout import Evidence, Move, Proposal, Stage, propose
from shadow.rollout_plan import GuardPlan, RolloutPlan

NOW = 1_000_000
PLAN = RolloutPlan(return_range=(0.0, 100.0), steps=(0.1, 0.5), guards={"return": GuardPlan(margin=10.0)})
LABELS = ["v1", "v2", "v3", "base"]


def document(**fields: Any) -> Document:
    deployment = Deployment(schema=1, policy="p", champion="v1", baseline="base")
    return Document(4, replace(deployment, **fields), 0, "me", rollout=PLAN)


def rolled(*moves: Move, plan: RolloutPlan = PLAN, start: Document | None = None) -> Document:
    """v2's rollout, some moves on."""
    at = begun(replace(start or document(), rollout=plan), "v2", "digest", "r1", "", NOW)
    for move in moves:
        at = made(at, move, "", NOW, "digest")
    return at


def stands(at: Document) -> tuple[str, list[tuple[str, float]], list[str]]:
    deployment = at.deployment
    return deployment.champion, [(each.version, each.weight) for each in deployment.challengers], deployment.shadows


def test_a_rollout_from_the_shadow_to_the_top() -> None:
    at = rolled()
    assert stands(at) == ("v1", [], ["v2"])
    at = made(at, Move.TRY, "", NOW)
    assert stands(at) == ("v1", [("v2", 0.1)], [])
    at = made(at, Move.ADVANCE, "", NOW)
    assert stands(at) == ("v1", [("v2", 0.5)], [])
    at = made(at, Move.PROMOTE, "better", NOW, lower=-3.0)
    assert stands(at) == ("v2", [], [])
    assert (at.marks["v1"].stage, at.margin_spent) == (Stage.RETIRED, 3.0)
    following = begun(at, "v3", "", "r2", "", NOW)
    assert following.standing is not None
    assert (following.standing.champion, following.standing.margin) == ("v2", 7.0), "what is left of the margin"


def test_a_promotion_that_shows_it_better_settles_the_account_and_one_by_hand_leaves_it() -> None:
    at = replace(rolled(Move.TRY), margin_spent=4.0)
    assert made(at, Move.PROMOTE, "", NOW, lower=0.5).margin_spent == 0.0
    assert made(at, Move.PROMOTE, "by hand", NOW).margin_spent == 4.0


@pytest.mark.parametrize("lower", [-3.0, 0.5, None])
def test_a_champion_that_is_rolled_back_leaves_the_account_as_it_was_before_it(lower: float | None) -> None:
    start = replace(document(), margin_spent=4.0)
    at = made(rolled(Move.TRY, start=start), Move.PROMOTE, "", NOW, lower=lower)
    assert made(at, Move.QUARANTINE, "", NOW, "digest").margin_spent == 4.0


def test_a_champion_comes_with_the_version_that_it_is_rolled_back_to() -> None:
    at = rolled(Move.TRY, Move.PROMOTE)
    assert (document().returns_to, rolled(Move.TRY).returns_to, at.returns_to) == (None, None, "v1")
    assert made(at, Move.QUARANTINE, "", NOW).returns_to is None
    assert quarantined(at, "v1", "", "bad", NOW).returns_to is None
    assert redeployed(at, replace(at.deployment, champion="v3"), NOW).returns_to is None


def test_back_out_of_the_canary_latches_until_a_person_releases() -> None:
    at = made(rolled(Move.TRY), Move.ROLL_BACK, "worse", NOW, "digest")
    assert (stands(at), at.marks["v2"]) == (("v1", [], []), Mark(Stage.QUARANTINED, "worse", NOW, "digest"))
    assert barred(at) == {"v2"}
    with pytest.raises(MoveRefused, match="release"):
        begun(at, "v2", "digest", "r2", "", NOW)
    assert begun(at, "v2", "other content", "r2", "", NOW).standing is not None
    again = released(at, "v2", "mended")
    assert again.standing is not None
    assert (again.marks, again.standing.stage) == ({}, Stage.REGISTERED)
    assert begun(again, "v2", "digest", "r2", "", NOW).deployment.shadows == ["v2"]
    other = released(quarantined(rolled(), "v3", "", "", NOW), "v3", "")
    assert (other.standing, other.marks) == (rolled().standing, {})


def test_back_from_the_top_brings_the_champion_before() -> None:
    at = made(rolled(Move.TRY, Move.PROMOTE), Move.QUARANTINE, "by hand", NOW, "digest")
    assert stands(at) == ("v1", [], [])
    assert set(at.marks) == {"v2"}
    top = rolled(Move.TRY, Move.PROMOTE)
    watched_by_it = redeployed(top, replace(top.deployment, shadows=["v1"]), NOW)
    assert stands(made(watched_by_it, Move.QUARANTINE, "", NOW, "digest")) == ("v1", [], [])


def test_a_version_whose_rollout_has_ended_is_latched_all_the_same() -> None:
    assert stands(quarantined(rolled(Move.TRY), "v2", "d", "bad", NOW)) == ("v1", [], [])
    at = quarantined(made(rolled(Move.TRY), Move.WITHDRAW, "", NOW), "v2", "d", "bad", NOW)
    assert at.standing is not None
    assert (at.standing.stage, at.marks["v2"].reason) == (Stage.QUARANTINED, "bad")
    by_hand = made(rolled(Move.TRY), Move.WITHDRAW, "", NOW)
    by_hand = redeployed(by_hand, replace(by_hand.deployment, champion="v2"), NOW)
    with pytest.raises(MoveRefused, match="v2 is champion"):
        quarantined(by_hand, "v2", "d", "", NOW)


def test_back_from_the_top_is_refused_where_nothing_is_to_come_back_to() -> None:
    at = rolled(Move.TRY, Move.PROMOTE)
    gone = quarantined(at, "v1", "", "bad", NOW)
    with pytest.raises(MoveRefused, match="quarantined: deploy another"):
        made(gone, Move.QUARANTINE, "", NOW)
    deployed = redeployed(at, replace(at.deployment, champion="v3"), NOW)
    assert deployed.standing is not None
    assert deployed.standing.stage is Stage.RETIRED
    with pytest.raises(MoveRefused, match="not champion"):
        made(replace(deployed, standing=at.standing), Move.QUARANTINE, "", NOW)


def test_whoever_resumes_gives_a_step_its_longest_time_again() -> None:
    at = paused(rolled(Move.TRY), "neither better nor worse")
    later = NOW + int(PLAN.max_duration_s * 1000)
    assert at.standing is not None
    again = resumed(at, "let it go on", later).standing
    assert again is not None
    nothing = Evidence(None, 0)
    assert propose(replace(at.standing, paused=""), nothing, later).pause, "without a person"
    assert not propose(again, nothing, later + 1_000).pause
    assert propose(again, nothing, later + int(PLAN.max_duration_s * 1000)).pause
    assert (again.since_ms, again.generation) == (at.standing.since_ms, at.standing.generation), "the same step"


def test_a_withdrawn_version_keeps_no_episode_and_no_blame() -> None:
    at = made(rolled(Move.TRY), Move.WITHDRAW, "", NOW)
    assert (stands(at), set(barred(at)), at.marks["v2"].stage) == (("v1", [], []), {"v2"}, Stage.REGISTERED)
    deployed = redeployed(at, replace(at.deployment, challengers=[Challenger("v2", 0.1)]), NOW)
    assert barred(deployed) == frozenset(), "a person lets it decide again"


def test_each_rollout_meets_other_keys() -> None:
    salt = b"salt"
    assert salt_of(document(), salt) == salt_of(rolled(), salt) == salt, "nobody is tried"
    assert salt_of(rolled(Move.TRY), salt) == b"saltr1"
    by_hand = document(challengers=[Challenger("v3", 0.1)])
    assert salt_of(replace(by_hand, standing=rolled(Move.TRY).standing), salt) == salt


def test_a_breaker_that_trips_rolls_back() -> None:
    at = rolled(Move.TRY)
    assert after_trips(at, lambda label: "digest", NOW) is None
    back = after_trips(replace(at, tripped=("v2",)), lambda label: f"of {label}", NOW)
    assert back is not None
    assert back.marks["v2"] == Mark(Stage.QUARANTINED, "its breaker tripped", NOW, "of v2")
    assert after_trips(replace(rolled(), tripped=("v2",)), lambda label: "", NOW) is None, "a shadow answers nobody"
    assert after_trips(replace(document(), tripped=("v1",)), lambda label: "", NOW) is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"champion": "v3"}, "champion"),
        ({"challengers": []}, "challengers"),
        ({"route_by": "key"}, "route_by"),
        ({"reward": RewardPolicy(window_s=1.0)}, "reward"),
    ],
)
def test_what_a_rollout_depends_on_is_not_changed_under_it(change: dict[str, Any], field: str) -> None:
    at = rolled(Move.TRY)
    with pytest.raises(MoveRefused, match="withdraw it first") as caught:
        redeployed(at, replace(at.deployment, **change), NOW)
    assert caught.value.field == field


def test_a_shadow_of_a_rollout_stays_and_others_may_come() -> None:
    at = rolled()
    with pytest.raises(MoveRefused, match="watches for its rollout"):
        redeployed(at, replace(at.deployment, shadows=[]), NOW)
    assert redeployed(at, replace(at.deployment, shadows=["v2", "v3"]), NOW).standing == at.standing


def test_a_deployment_by_hand_takes_no_quarantined_version_and_forgets_what_was_retired() -> None:
    at = quarantined(document(), "v3", "", "bad", NOW)
    with pytest.raises(InvalidField, match="quarantined") as caught:
        redeployed(at, replace(at.deployment, challengers=[Challenger("v3", 0.1)]), NOW)
    assert caught.value.field == "challengers[0].version"
    retired = rolled(Move.TRY, Move.PROMOTE)
    back = redeployed(retired, replace(retired.deployment, champion="v1"), NOW)
    assert (back.marks, back.deployment.champion) == ({}, "v1")


@pytest.mark.parametrize(
    ("at", "version", "words"),
    [
        (document(), "v1", "is champion"),
        (document(), "base", "is baseline"),
        (rolled(), "v3", "one at a time"),
        (document(challengers=[Challenger("v3", 0.1)]), "v2", "take it out"),
        (document(shadows=["a", "b", "c", "d"]), "v2", "shadows"),
    ],
)
def test_a_rollout_that_cannot_begin(at: Document, version: str, words: str) -> None:
    with pytest.raises(MoveRefused, match=words):
        begun(at, version, "", "r2", "", NOW)


def test_the_range_of_returns_comes_from_the_plan_or_the_rewards_or_is_asked_for() -> None:
    def returns(plan: RolloutPlan, reward: RewardPolicy) -> tuple[float, float] | None:
        standing = begun(replace(document(reward=reward), rollout=plan), "v2", "", "r", "", NOW).standing
        return None if standing is None else standing.returns

    bounded = RewardPolicy(range=(-1.0, 1.0))
    assert returns(RolloutPlan(), bounded) == (-1.0, 1.0)
    assert returns(RolloutPlan(return_range=(0.0, 5.0)), bounded) == (0.0, 5.0)
    for plan, reward in ((RolloutPlan(objective="episode"), bounded), (RolloutPlan(), RewardPolicy())):
        with pytest.raises(InvalidField) as caught:
            returns(plan, reward)
        assert caught.value.field == "rollout.return_range"
    straight = begun(replace(document(reward=bounded), rollout=RolloutPlan(shadow=False)), "v2", "", "r", "", NOW)
    assert stands(straight) == ("v1", [("v2", 0.01)], [])
    with pytest.raises(InvalidField):
        begun(replace(document(), rollout=None), "v2", "", "r", "", NOW)


def test_what_is_remembered_of_a_deleted_version_goes_unless_it_is_latched() -> None:
    retired, latched = rolled(Move.TRY, Move.PROMOTE), quarantined(document(), "v3", "d", "bad", NOW)
    gone = forgotten(retired, "v1")
    assert gone is not None
    assert gone.marks == {}
    assert forgotten(latched, "v3") is None
    assert forgotten(latched, "v1") is None


def test_other_content_under_a_quarantined_label_may_be_deployed_as_it_may_be_rolled_out() -> None:
    at = quarantined(document(), "v3", "bad content", "bad", NOW)
    wanted = replace(at.deployment, champion="v3")
    assert redeployed(at, wanted, NOW, lambda label: "other content").deployment.champion == "v3"
    with pytest.raises(InvalidField, match="quarantined"):
        redeployed(at, wanted, NOW, lambda label: "bad content")


@pytest.mark.parametrize(
    ("at", "pushed", "expected"),
    [
        (document(), {"v1": 1, "v2": 2}, "v2"),
        (document(), {"v2": 2}, "v2"),  # the champion is the directory's
        (document(), {"v1": 1}, None),
        (document(), {}, None),
        (document(), {"v1": 3, "v2": 2}, None),  # the champion is newer
        (document(), {"v2": 2, "v3": 3}, "v3"),
        (document(shadows=["v2"]), {"v2": 2}, None),  # a person lets it watch
        (rolled(), {"v2": 2, "v3": 3}, None),  # one at a time
        (made(rolled(Move.TRY), Move.ROLL_BACK, "", NOW, "d"), {"v2": 2}, None),
        (made(rolled(Move.TRY), Move.WITHDRAW, "", NOW), {"v2": 2, "v0": 1}, None),
        (made(rolled(Move.TRY), Move.WITHDRAW, "", NOW), {"v2": 2, "v3": 3}, "v3"),
        (rolled(Move.TRY, Move.PROMOTE), {"v1": 1, "v2": 2, "v3": 3}, "v3"),
        (
            made(begun(made(rolled(), Move.WITHDRAW, "", NOW), "v3", "", "r2", "", NOW), Move.WITHDRAW, "", NOW),
            {"v3": 2, "v2": 3},
            None,
        ),  # both were withdrawn
    ],
)
def test_the_version_that_was_pushed_last_begins_by_itself(
    at: Document, pushed: dict[str, int], expected: str | None
) -> None:
    by_itself = replace(at, rollout=replace(PLAN, begin="pushed"))
    assert next_version(by_itself, pushed) == expected
    assert next_version(at, pushed) is None, "unless the plan says otherwise"


@pytest.mark.parametrize(
    "refused",
    [
        lambda: made(document(), Move.PROMOTE, "", NOW),
        lambda: made(rolled(), Move.PROMOTE, "", NOW),
        lambda: made(rolled(Move.TRY, Move.PROMOTE), Move.REPLACE, "", NOW),
        lambda: made(rolled(Move.TRY, Move.WITHDRAW), Move.QUARANTINE, "", NOW),
        lambda: weighed(rolled(), 0.2, "", NOW),
        lambda: paused(rolled(Move.TRY, Move.PROMOTE), ""),
        lambda: resumed(rolled(), "", NOW),
        lambda: released(document(), "v2", ""),
        lambda: quarantined(document(), "v1", "", "", NOW),
        lambda: quarantined(document(), "base", "", "", NOW),
        lambda: quarantined(quarantined(document(), "v3", "", "", NOW), "v3", "", "", NOW),
    ],
)
def test_moves_that_cannot_be_are_refused(refused: Any) -> None:
    with pytest.raises(MoveRefused):
        refused()


def test_a_weight_by_hand_is_a_step_of_its_own() -> None:
    at = weighed(rolled(Move.TRY), 0.3, "faster", NOW)
    assert stands(at) == ("v1", [("v2", 0.3)], [])
    assert at.standing is not None
    assert (at.standing.floor, at.standing.place, at.standing.generation) == (0.1, 1, 5)
    with pytest.raises(InvalidField):
        weighed(at, 1.0, "", NOW)


def test_what_the_service_proposes_is_done_kept_or_nothing() -> None:
    at, forward = rolled(Move.TRY), Proposal(Move.ADVANCE, "proven")
    assert stands(followed(at, forward, NOW))[1] == [("v2", 0.5)]
    assert followed(at, Proposal(None, "waits"), NOW) is at
    stopped = followed(at, Proposal(None, "ratio", pause=True), NOW)
    assert stopped.standing is not None
    assert stopped.standing.paused == "ratio"
    by_hand = rolled(Move.TRY, plan=replace(PLAN, mode="manual"))
    waits = followed(by_hand, forward, NOW)
    assert waits.standing is not None
    assert (waits.standing.proposal, stands(waits)[1]) == (Move.ADVANCE, [("v2", 0.1)])
    assert followed(waits, Proposal(Move.ADVANCE, "still"), NOW) is waits
    back = followed(waits, Proposal(Move.ROLL_BACK, "worse"), NOW, "digest")
    assert back.marks["v2"].digest == "digest"


ORDERS = st.one_of(
    st.tuples(st.just("begin"), st.sampled_from(LABELS)),
    st.tuples(st.just("move"), st.sampled_from(list(Move))),
    st.tuples(st.just("weight"), st.sampled_from([0.05, 0.1, 0.3, 0.9])),
    st.tuples(st.sampled_from(["pause", "resume"]), st.none()),
    st.tuples(st.sampled_from(["quarantine", "release", "deploy", "watch"]), st.sampled_from(LABELS)),
)


def ordered(at: Document, name: str, what: Any, number: int) -> Document:
    now = NOW + number
    orders: dict[str, Callable[[], Document]] = {
        "begin": lambda: begun(at, what, "d", f"r{number}", "", now),
        "move": lambda: made(at, what, "", now, "d", lower=-1.0),
        "weight": lambda: weighed(at, what, "", now),
        "pause": lambda: paused(at, ""),
        "resume": lambda: resumed(at, "", NOW),
        "quarantine": lambda: quarantined(at, what, "d", "", now),
        "release": lambda: released(at, what, ""),
        "deploy": lambda: redeployed(at, replace(at.deployment, champion=what, challengers=[], shadows=[]), now),
        "watch": lambda: redeployed(at, watched(at, what), now),
    }
    return orders[name]()


def watched(at: Document, label: str) -> Deployment:
    """As `changes.py` makes it: what cannot be is an error that names the field."""
    try:
        return replace(at.deployment, shadows=[label])
    except ValueError as error:
        raise InvalidField(str(error), "shadows") from None


@settings(max_examples=600)
@given(st.lists(ORDERS, max_size=30))
def test_rollout_and_deployment_never_disagree(orders: list[tuple[str, Any]]) -> None:
    at, places = document(), set()
    for number, (name, what) in enumerate(orders):
        try:
            after = ordered(at, name, what, number)
        except SurefootError:
            continue
        at = replace(after, generation=at.generation + 1)
        agrees(at)
        standing = at.standing
        if standing is not None and standing.generation == at.generation and standing.stage is Stage.CANARY:
            place = standing.id, standing.place
            assert place not in places, "no place in α twice"
            places.add(place)


def agrees(at: Document) -> None:
    champion, challengers, shadows = stands(at)
    bad = {label for label, mark in at.marks.items() if mark.stage is Stage.QUARANTINED}
    assert not bad & at.deployment.deciding.keys()
    assert champion in LABELS
    standing = at.standing
    if standing is None:
        assert challengers == []
        return
    if standing.under_way:
        assert standing.champion == champion
    assert challengers == ([(standing.version, standing.weight)] if standing.stage is Stage.CANARY else [])
    if standing.stage is Stage.SHADOW:
        assert standing.version in shadows
    if standing.stage is Stage.CHAMPION:
        assert champion == standing.version
    if standing.stage is Stage.QUARANTINED:
        assert standing.version in bad
