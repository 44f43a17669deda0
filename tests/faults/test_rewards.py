"""Rewards in any order, by hypothesis over HTTP: one takes effect, whatever else is sent for the decision."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, rule, run_state_machine_as_test

from tests.faults.report import Report, Settings, table
from tests.faults.scenarios.rewards import NAMES, VALUES, Contest, Sending, act, forge
from tests.faults.world import World, world

CHANCE = random.Random(1)


@pytest.fixture
def here() -> Iterator[World]:
    with (
        tempfile.TemporaryDirectory(prefix="surefoot-faults-") as folder,
        world(Settings(Path(folder), 1), verdict_wait_s="5") as found,
    ):
        yield found


def machine(here: World) -> Any:
    class Rewarding(RuleBasedStateMachine):
        """Decisions, and what is sent for them, in any order."""

        contests = Bundle("contests")

        @rule(target=contests)
        def decide(self) -> Contest:
            return Contest(here, act(here, CHANCE))

        @rule(contest=contests, name=st.sampled_from(NAMES), value=st.sampled_from(VALUES))
        def reward(self, contest: Contest, name: str | None, value: float) -> None:
            assert contest.send(Sending(0, name, value)) == []

        @rule(contest=contests)
        def repeat(self, contest: Contest) -> None:
            if contest.first is not None:
                assert contest.send(contest.first) == []

        @rule(contest=contests, at=st.integers(0, 59), by=st.integers(0, 15))
        def forge(self, contest: Contest, at: int, by: int) -> None:
            assert forge(here, contest.decision, at % len(contest.decision), by) == []

        @rule(contest=consumes(contests))
        def forget(self, contest: Contest) -> None:
            """It is never rewarded again: its window closes it."""

    return Rewarding


def test_exactly_one_reward_takes_effect(here: World) -> None:
    run_state_machine_as_test(machine(here), settings=settings(max_examples=15, stateful_step_count=20, deadline=None))
    report = Report(19, "hypothesis", here.settle())
    assert not report.failures, "\n" + table([report])
    assert report.verdict.rewards.acknowledged > 0
