"""The rollout table and the next move: nothing moves without evidence, and back is always the shortest way."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadow.rollout import (
    TABLE,
    Evidence,
    GuardPlan,
    Move,
    Proposal,
    RolloutPlan,
    Stage,
    Standing,
    applied,
    diagram,
    moved,
    propose,
    step,
    weight,
)
from shadow.verdicts import Verdict

PLAN = RolloutPlan(hold_s=100.0, min_units=30, max_duration_s=1_000.0, guards={"return": GuardPlan(margin=0.02)})
NOW = 1_000_000
ENOUGH = Evidence(Verdict.ADVANCE, 30, reason="return proven")


def canary(at: int = 0, waited_s: float = 100.0, **fields: object) -> Standing:
    return Standing("r1", "v2", Stage.CANARY, at, NOW - int(waited_s * 1000), **fields)  # type: ignore[arg-type]


def shadow(waited_s: float = 100.0) -> Standing:
    return Standing("r1", "v2", Stage.SHADOW, 0, NOW - int(waited_s * 1000))


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
    standing, weights = Standing("r1", "v2", Stage.REGISTERED), []
    standing = applied(standing, Move.WATCH, "pushed", NOW)
    now = NOW
    for _ in range(20):
        now += 100_000
        proposal = propose(PLAN, standing, ENOUGH._replace(gate="passes"), now)
        standing = moved(standing, proposal, PLAN, now)
        weights.append(weight(PLAN, standing))
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
        (Standing("r1", "v2", Stage.QUARANTINED), ENOUGH._replace(gate="passes"), None, False),
        (Standing("r1", "v2", Stage.CHAMPION), ENOUGH, None, False),
    ],
)
def test_the_next_move(standing: Standing, evidence: Evidence, move: Move | None, pause: bool) -> None:
    proposal = propose(PLAN, standing, evidence, NOW)
    assert (proposal.move, proposal.pause) == (move, pause)
    assert proposal.reason or evidence is ENOUGH


def test_by_hand_everything_is_proposed_but_a_rollback() -> None:
    by_hand = msgspec.structs.replace(PLAN, mode="manual")
    waits = moved(canary(), propose(by_hand, canary(), ENOUGH, NOW), by_hand, NOW)
    assert (waits.stage, waits.step, waits.proposal) == (Stage.CANARY, 0, Move.ADVANCE)
    back = moved(waits, propose(by_hand, waits, Evidence(Verdict.ROLLBACK, 9, reason="worse"), NOW), by_hand, NOW)
    assert (back.stage, back.proposal, back.reason) == (Stage.QUARANTINED, None, "worse")
    assert moved(back, propose(by_hand, back, ENOUGH, NOW), by_hand, NOW) == back, "latched"


def test_a_pause_says_why_and_keeps_the_step() -> None:
    paused = moved(canary(2), Proposal(None, "ratio", pause=True), PLAN, NOW)
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
    move = propose(PLAN, standing, evidence, NOW).move
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
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        msgspec.convert(fields, RolloutPlan)
