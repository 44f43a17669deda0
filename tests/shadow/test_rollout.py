"""The rollout table and the next move: nothing moves without evidence, and back is always the shortest way."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadow.rollout import (
    TABLE,
    Evidence,
    Move,
    Proposal,
    Stage,
    Standing,
    applied,
    diagram,
    moved,
    propose,
    step,
    turned,
)
from shadow.rollout_plan import DEFAULTS, MEASURES, GuardPlan, RolloutPlan
from shadow.verdicts import Verdict

PLAN = RolloutPlan(hold_s=100.0, min_units=30, max_duration_s=1_000.0, guards={"return": GuardPlan(margin=0.02)})
NOW = 1_000_000
ENOUGH = Evidence(Verdict.ADVANCE, 30, reason="return proven")


def standing_at(stage: Stage, waited_s: float = 0.0, plan: RolloutPlan = PLAN, **fields: Any) -> Standing:
    return Standing("r1", "v2", "v1", stage, plan, since_ms=NOW - int(waited_s * 1000), **fields)


def canary(at: int = 0, waited_s: float = 100.0, **fields: Any) -> Standing:
    return standing_at(Stage.CANARY, waited_s, step=at, weight=PLAN.steps[at], **fields)


def shadow(waited_s: float = 100.0, plan: RolloutPlan = PLAN) -> Standing:
    return standing_at(Stage.SHADOW, waited_s, plan)


@pytest.mark.parametrize(("stage", "move"), list(itertools.product(Stage, Move)))
def test_a_pair_outside_the_table_raises(stage: Stage, move: Move) -> None:
    if (stage, move) in TABLE:
        assert step(stage, move) is TABLE[stage, move]
    else:
        with pytest.raises(ValueError, match=stage.value):
            step(stage, move)


def test_every_stage_that_serves_can_be_quarantined_and_only_a_release_leads_out() -> None:
    assert all(TABLE[stage, Move.QUARANTINE] is Stage.QUARANTINED for stage in Stage if stage is not Stage.QUARANTINED)
    assert {move for (stage, move) in TABLE if stage is Stage.QUARANTINED} == {Move.RELEASE}


def test_only_a_canary_becomes_champion() -> None:
    assert {pair for pair, after in TABLE.items() if after is Stage.CHAMPION} == {(Stage.CANARY, Move.PROMOTE)}


def test_the_diagram_draws_every_pair() -> None:
    assert diagram().count("-->") == len(TABLE) + 1


def test_a_rollout_walks_to_the_end_and_its_weights_rise() -> None:
    standing, weights = standing_at(Stage.REGISTERED), []
    standing = applied(standing, Move.WATCH, "pushed", NOW)
    now = NOW
    for _ in range(20):
        now += 100_000
        proposal = propose(standing, ENOUGH._replace(gate="passes"), now)
        standing = moved(standing, proposal, now)
        weights.append(standing.weight)
        if standing.stage is Stage.CHAMPION:
            break
    assert weights == [0.01, 0.05, 0.1, 0.25, 0.5, 0.0]
    assert applied(standing, Move.REPLACE, "v3", now).stage is Stage.RETIRED


@pytest.mark.parametrize(
    ("standing", "evidence", "move", "pause"),
    [
        (canary(), ENOUGH, Move.ADVANCE, False),
        (canary(4), ENOUGH, Move.PROMOTE, False),
        (canary(), ENOUGH._replace(units=29), None, False),
        (canary(waited_s=99.0), ENOUGH, None, False),
        (canary(), Evidence(None, 0), None, False),
        (canary(), Evidence(Verdict.HOLD, 500), None, False),
        (canary(waited_s=1_000.0), Evidence(Verdict.HOLD, 500), None, True),
        (canary(waited_s=1_000.0), Evidence(None, 0), None, True),
        (canary(waited_s=1_000.0), ENOUGH, Move.ADVANCE, False),
        (canary(waited_s=0.0), Evidence(Verdict.ROLLBACK, 3), Move.ROLL_BACK, False),
        (canary(), Evidence(Verdict.ROLLBACK, 3, mismatched=True), Move.ROLL_BACK, False),
        (canary(), ENOUGH._replace(mismatched=True), None, True),
        (canary(), Evidence(Verdict.PAUSE, 3), None, True),
        (canary(paused="by hand"), ENOUGH, None, False),
        (canary(paused="by hand"), Evidence(Verdict.ROLLBACK, 99), Move.ROLL_BACK, False),
        (shadow(), Evidence(None, 0, gate="passes"), Move.TRY, False),
        (shadow(99.0), Evidence(None, 0, gate="passes"), None, False),
        (shadow(), Evidence(None, 0, gate="no_evidence"), None, False),
        (shadow(1_000.0), Evidence(None, 0, gate="no_evidence"), None, True),
        (shadow(0.0), Evidence(None, 0, gate="fails"), None, True),
        (shadow(0.0), Evidence(None, 0, broken="it tripped"), Move.QUARANTINE, False),
        (canary(paused="by hand"), Evidence(None, 0, broken="it tripped"), Move.QUARANTINE, False),
        (standing_at(Stage.QUARANTINED), Evidence(None, 0, broken="it tripped"), None, False),
        (standing_at(Stage.QUARANTINED), ENOUGH._replace(gate="passes"), None, False),
        (standing_at(Stage.CHAMPION), ENOUGH, None, False),
    ],
)
def test_the_next_move(standing: Standing, evidence: Evidence, move: Move | None, pause: bool) -> None:
    proposal = propose(standing, evidence, NOW)
    assert (proposal.move, proposal.pause) == (move, pause)
    assert proposal.reason or evidence is ENOUGH


def test_by_hand_everything_is_proposed_but_a_rollback() -> None:
    here = msgspec.structs.replace(canary(), plan=msgspec.structs.replace(PLAN, mode="manual"))
    waits = moved(here, propose(here, ENOUGH, NOW), NOW)
    assert (waits.stage, waits.step, waits.proposal) == (Stage.CANARY, 0, Move.ADVANCE)
    back = moved(waits, propose(waits, Evidence(Verdict.ROLLBACK, 9, reason="worse"), NOW), NOW)
    assert (back.stage, back.proposal, back.reason) == (Stage.QUARANTINED, None, "worse")
    assert moved(back, propose(back, ENOUGH, NOW), NOW) == back, "latched"


def test_an_advisory_gate_holds_only_what_it_refutes() -> None:
    here = shadow(plan=msgspec.structs.replace(PLAN, gate="advisory"))
    assert propose(here, Evidence(None, 0), NOW).move is Move.TRY
    assert propose(here, Evidence(None, 0, gate="fails"), NOW) == Proposal(
        None, "the gate before the canary fails", pause=True
    )


def test_steps_keep_their_places_in_alpha_and_what_keys_have_met() -> None:
    standing, found = applied(shadow(), Move.TRY, "", NOW), []
    for _ in range(2):
        found.append((standing.weight, standing.floor, standing.place))
        standing = applied(standing, Move.ADVANCE, "", NOW)
    standing = turned(standing, 0.3, "faster", NOW)
    found.append((standing.weight, standing.floor, standing.place))
    assert found == [(0.01, 0.0, 0), (0.05, 0.01, 1), (0.3, 0.1, 3)]
    assert standing.step == 3, "0.25 is behind it, 0.5 follows"
    assert applied(standing, Move.ADVANCE, "", NOW).weight == 0.5


def test_no_place_in_alpha_is_used_twice_whatever_a_person_does() -> None:
    standing, places = applied(shadow(), Move.TRY, "", NOW), [0]
    for weight in (0.05, 0.01, 0.05, 0.5):
        standing = turned(standing, weight, "", NOW)
        places.append(standing.place)
    assert places == [0, 1, 2, 3, 4]


def test_beyond_the_last_step_there_is_none() -> None:
    with pytest.raises(ValueError, match="promote"):
        applied(canary(4), Move.ADVANCE, "", NOW)


@pytest.mark.parametrize(("standing", "weight"), [(shadow(), 0.1), (canary(), 0.0), (canary(), 1.0)])
def test_a_weight_that_cannot_be_is_refused(standing: Standing, weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        turned(standing, weight, "", NOW)


def test_guards_that_a_plan_does_not_name_stand_with_their_defaults() -> None:
    plan = RolloutPlan(guards={"error": GuardPlan(margin=0.2, action="inform"), "return": GuardPlan(must_prove=False)})
    assert plan.margin((-100.0, 100.0)) == 10.0
    guards = {guard.measure: guard for guard in plan.measured((-100.0, 100.0), 7.5)}
    assert tuple(guards) == MEASURES == tuple(DEFAULTS)
    assert (guards["return"].margin, guards["return"].must_prove, guards["return"].action) == (7.5, False, "rollback")
    assert (guards["error"].margin, guards["error"].action) == (0.2, "inform")
    assert guards["fallback"].margin == DEFAULTS["fallback"][0]
    assert (plan.budget.guards, plan.budget.steps, plan.budget.total) == (len(MEASURES), 5, 0.01)


def test_a_pause_says_why_and_keeps_the_step() -> None:
    paused = moved(canary(2), Proposal(None, "ratio", pause=True), NOW)
    assert (paused.stage, paused.step, paused.paused, paused.latched) == (Stage.CANARY, 2, "ratio", True)


@given(
    st.sampled_from([None, *Verdict]), st.integers(0, 100), st.booleans(),
    st.sampled_from(["passes", "fails", "no_evidence"]), st.floats(0, 2_000), st.integers(0, 4), st.booleans(),
)  # fmt: skip
def test_without_proof_nothing_goes_forward(
    verdict: Verdict | None, units: int, mismatched: bool, gate: str, waited_s: float, at: int, watching: bool
) -> None:
    standing = shadow(waited_s) if watching else canary(at, waited_s)
    evidence = Evidence(verdict, units, mismatched, gate)  # type: ignore[arg-type]
    move = propose(standing, evidence, NOW).move
    if move in (Move.ADVANCE, Move.PROMOTE):
        assert verdict is Verdict.ADVANCE
        assert units >= PLAN.min_units
        assert not mismatched
    if move is Move.TRY:
        assert gate == "passes"
    if move is Move.ROLL_BACK:
        assert verdict is Verdict.ROLLBACK


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": [0.1, 0.1]}, "rise"),
        ({"return_range": [1.0, 1.0]}, "return_range"),
        ({"hold_s": 10, "max_duration_s": 9}, "max_duration_s"),
        ({"steps": []}, "steps"),
        ({"steps": [1.0]}, "steps"),
        ({"guards": {"return": {"margin": -1}}}, "margin"),
        ({"guards": {"speed": {"margin": 1}}}, "speed"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        msgspec.convert(fields, RolloutPlan)


@pytest.mark.parametrize(
    ("weight", "following"), [(0.005, 0), (0.01, 1), (0.03, 1), (0.3, 4), (0.5, None), (0.9, None)]
)
def test_after_a_weight_by_hand_the_next_step_is_the_first_that_is_larger(weight: float, following: int | None) -> None:
    standing = turned(canary(at=2), weight, "", NOW)
    assert standing.next_step == following
    if following is None:
        assert propose(standing, ENOUGH, NOW + 100_000).move is Move.PROMOTE
        with pytest.raises(ValueError, match="promote it"):
            applied(standing, Move.ADVANCE, "", NOW)
    else:
        advanced = applied(standing, Move.ADVANCE, "", NOW)
        assert (advanced.step, advanced.weight) == (following, PLAN.steps[following])


def test_a_step_in_which_nothing_can_be_measured_says_so() -> None:
    proposal = propose(canary(), Evidence(None, 0, blind="no unit is dealt anew"), NOW)
    assert (proposal.move, proposal.pause) == (None, False)
    assert "nothing is measured" in proposal.reason
    assert "no unit is dealt anew" in proposal.reason
