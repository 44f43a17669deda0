"""One shadow at work, with real networks: what fails is scored as failing, and concerns nobody else."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest

from policies.errors import BundleError
from service.plan import Row
from shadow.memory import OVERHEAD_BYTES, Episodes, waves
from shadow.runner import Runner
from shadow.scores import MOST_NUMBERS, decode_score, encode_score
from shadow.shown import Rows, joined
from shadow.waiting import Waiting
from tests.policies.growing import ENDLESS
from tests.policies.networks import index_of_largest, linear
from tests.service.pipelines import IDENTITY, plan, rows, version
from tests.service.test_act_spaces import counter, factors, points
from tests.service.watching import (
    METRICS,
    Scorekeeper,
    crashing,
    deaf,
    honest,
    many,
    odd,
    rows_of,
    sleeping,
)
from tests.waiting import until

LIVE = version(METRICS, "v1", IDENTITY, exploration={"epsilon": 0.0})
ALONE = plan({"v1": LIVE})


def test_a_score_says_what_the_shadow_would_have_done_and_how_likely_what_was_done_was() -> None:
    keeper = Scorekeeper(honest())
    shown = rows_of(ALONE, rows([1.0, 3.0], [2.0, 1.0], allowed=(0, 1)))
    first, second = keeper.shown(shown)
    assert (first.version, first.decided, first.share, first.v) == ("s", "v1", 1.0, 1)
    assert first.decision_id == shown.ids[0]
    assert len(first.digest) == 64
    assert (first.propensity, first.log_propensity, first.kind) == (1.0, 0.0, "mass")
    # The live version takes the larger number, the shadow the other.
    assert (first.probability, first.log_probability, first.proposed, first.agrees) == (0.0, None, 0, False)
    assert np.frombuffer(first.target).tolist() == [1.0, 0.0]
    assert (first.divergence, first.kl) == (1.0, None)
    # It says that what was done (1) is worth 1.0, and that its own choice is worth 3.0; the live version said 3.0.
    assert (first.value, first.expected, first.difference) == (1.0, 3.0, -2.0)
    assert (first.fault, first.fallback, first.overridden) == ("", False, False)
    assert second.proposed == 1
    assert first.latency_us > 0.0
    assert decode_score(encode_score(first)) == first


def test_a_stochastic_shadow_gives_probabilities_under_the_logged_mask() -> None:
    keeper = Scorekeeper(honest(swapped=False, head="logits", exploration={"epsilon": 0.4}))
    shown = rows_of(ALONE, [Row(state=[0.0, 1.0]), Row(state=[0.0, 1.0], allowed=(0,))])
    free, bound = keeper.shown(shown)
    p = 1 / (1 + math.exp(-1.0))
    assert free.probability == pytest.approx(p)
    assert free.kl == pytest.approx((1 - p) * math.inf) if free.kl else free.kl is None
    assert (bound.probability, bound.proposed) == (1.0, 0)
    assert np.frombuffer(bound.target).tolist() == [1.0, 0.0]


def test_a_state_that_crashes_the_network_speaks_for_itself_alone() -> None:
    keeper = Scorekeeper(crashing())
    states = [[float(i % 2), 1.0] for i in range(40)]
    states[17] = [9.0, 1.0]
    found = keeper.shown(rows_of(ALONE, rows(*states)))
    assert [score.fault for score in found] == [""] * 17 + ["inference_failed"] + [""] * 22
    assert (found[17].fallback, found[17].proposed) == (True, 0)
    assert keeper.runner.statistics().status == "watching"


def test_a_network_that_always_crashes_trips_and_is_asked_no_more() -> None:
    keeper = Scorekeeper(crashing())
    shown = rows_of(ALONE, rows(*[[9.0, 1.0]] * 40))
    assert len(keeper.shown(shown)) == 40
    calls = keeper.runner.totals.calls
    assert keeper.runner.statistics().status == "tripped"
    assert keeper.shown(shown) == []
    view = keeper.runner.view()
    assert (view["dropped"]["tripped"], view["calls"], view["status"]) == (40, calls, "tripped")
    keeper.runner.rearm()
    (score,) = keeper.shown(shown.some([0]))
    assert score.fault == "inference_failed"
    assert keeper.runner.statistics().status == "watching", "one fault is one fault again"


def test_answers_that_are_no_numbers_are_faults_of_the_row() -> None:
    keeper = Scorekeeper(odd())
    found = keeper.shown(rows_of(ALONE, rows([2.0, 1.0], [-1.0, 1.0], [3.0, 1.0])))
    assert [score.fault for score in found] == ["", "not_finite", ""]
    assert (found[1].value, found[1].expected, found[1].difference, found[1].probability) == (None, None, None, 0.0)
    assert keeper.runner.view()["fault_rate"] == pytest.approx(1 / 3)
    for _ in range(5):
        keeper.shown(rows_of(ALONE, rows([-1.0, 1.0])))
    assert keeper.runner.statistics().status == "tripped"


def test_a_call_that_takes_too_long_is_ended_and_counts_as_a_fault() -> None:
    keeper = Scorekeeper(sleeping(), limit_s=0.05)
    found = keeper.shown(rows_of(ALONE, rows(ENDLESS, [0.0, 1.0])))
    assert [score.fault for score in found] == ["inference_timeout"] * 2
    assert keeper.runner.totals.calls == 1
    until(lambda: keeper.shown(rows_of(ALONE, rows([0.0, 1.0])))[-1].fault == "", "an answer in 50 ms")


def test_one_kernel_that_nothing_interrupts_keeps_its_thread_and_nothing_else() -> None:
    keeper = Scorekeeper(deaf(), limit_s=0.01, waiting=Waiting(most_rows=32))
    runner = keeper.runner
    runner.start("deaf")
    slow = rows_of(ALONE, rows([3000.0, 0.0]))
    runner.offer_nowait(slow)
    until(lambda: runner.statistics().busy_s > 0.0 or runner.totals.calls, "the kernel")
    for i in range(50):
        runner.offer_nowait(many(16, f"{i}-"))
        assert runner.statistics().waiting_rows <= 32
    assert runner.totals.dropped["shed"] > 0
    until(lambda: not runner.statistics().waiting_rows and not runner.statistics().in_hand, "the queue")
    assert keeper.scores[0].fault == "inference_timeout", "it came too late"
    runner.close()
    assert runner.join(10.0)
    runner.offer_nowait(slow)
    assert runner.totals.dropped["closed"] == 1


def test_a_network_that_does_not_open_says_why_and_is_tried_again() -> None:
    tries: list[int] = []

    def broken() -> Any:
        tries.append(1)
        raise BundleError("no such device", None, "load")

    runner = Runner(broken, lambda ids, n: np.zeros((len(ids), n)), lambda entries: None)
    runner.offer_nowait(many(3))
    assert runner.run_once() == 3
    runner.offer_nowait(many(2))
    now = runner.statistics()
    assert (now.status, now.why) == ("failed", "no such device")
    assert runner.totals.dropped["internal"] == 5
    runner.rearm()
    runner.offer_nowait(many(1))
    assert runner.run_once() == 1
    assert len(tries) == 2


def test_a_fault_of_the_comparison_or_of_the_sink_is_counted_and_survived() -> None:
    keeper = Scorekeeper(honest())

    def full(entries: Any) -> None:
        raise RuntimeError("no")

    keeper.runner._sink = full
    assert keeper.shown(rows_of(ALONE, rows([0.0, 1.0]))) == []
    assert keeper.runner.totals.dropped["internal"] == 1
    wrong = many(2, states=np.zeros((2, 7), np.float32))  # the network refuses them
    assert [score.fault for score in Scorekeeper(honest()).shown(wrong)] == ["inference_failed"] * 2
    broken = Scorekeeper(honest())
    broken.runner.offer_nowait(many(1))
    broken.runner.offer_nowait(many(1, states=np.zeros((1, 7), np.float32)))  # of another shape: they do not join
    assert broken.runner.run_once() == 2
    assert broken.runner.totals.dropped["internal"] == 2
    assert broken.runner.statistics().in_hand == 0
    other = Scorekeeper(points("gaussian"))
    other.runner.offer_nowait(many(2))  # decisions over choices, to a shadow in a box
    assert other.runner.run_once() == 2
    assert other.runner.totals.dropped["internal"] == 2


def test_batches_of_one_kind_are_scored_together_and_others_apart() -> None:
    keeper = Scorekeeper(honest())
    soft = plan({"v1": version(METRICS, "v1", IDENTITY, head="logits")})
    for each in (ALONE, ALONE, soft, ALONE):
        keeper.runner.offer_nowait(rows_of(each, rows([0.0, 1.0])))
    assert keeper.runner.run_once() == 4
    assert keeper.runner.totals.calls == 2
    assert len(keeper.scores) == 4


def test_rows_are_joined_and_picked_alike() -> None:
    one, two = many(3, "a"), many(2, "b", asked=np.ones((2, 2), np.bool_))
    assert [len(part) for part in joined([one, two, one])] == [6, 2]
    both = joined([many(3, "a"), many(2, "b")])[0]
    assert both.ids == ["a0", "a1", "a2", "b0", "b1"]
    picked = both.some([4, 0])
    assert picked.ids == ["b1", "a0"]
    assert len(picked.logged.actions) == 2
    points_ = [rows_of(plan({"v1": points("gaussian")}), rows([0.1, 0.2])) for _ in range(2)]
    assert [len(part) for part in joined(points_)] == [2]


STILL: dict[str, Any] = {"exploration": {"epsilon": 0.0}}
SAME = {
    "tanh": points("squashed_gaussian", **STILL),
    "gaussian": points("gaussian", **STILL),
    "point": points("action", **STILL),
    "factors": factors(**STILL),
}


@pytest.mark.parametrize("kind", SAME)
def test_a_version_that_watches_itself_gives_what_it_did_what_was_logged(kind: str) -> None:
    live = SAME[kind]
    random = np.random.default_rng(1)
    states = [random.normal(size=2).tolist() for _ in range(30)] + [[math.nan, 0.0]]
    found = Scorekeeper(live).shown(rows_of(plan({"v1": live}), [Row(state=state) for state in states]))
    assert len(found) == 31
    for score in found:
        assert score.agrees
        assert score.divergence == 0.0
        assert score.log_probability == pytest.approx(score.log_propensity, abs=1e-6)
    assert (found[-1].fault, found[-1].fallback, found[-1].probability) == ("not_finite", True, 1.0)


def test_wide_distributions_are_left_out() -> None:
    n = MOST_NUMBERS + 1
    wide = version(
        METRICS, "v1", linear(np.zeros((2, n)).tolist()), golden_outputs=np.zeros((2, n)).tolist(), fallback=0,
        action={"kind": "discrete", "n": n},
    )  # fmt: skip
    (score,) = Scorekeeper(wide).shown(rows_of(plan({"v1": wide}), rows([0.0, 1.0])))
    assert score.target == b""
    assert score.probability is not None


def test_a_network_that_names_actions_is_scored_too() -> None:
    named = version(METRICS, "s", index_of_largest(), head="action")
    (score,) = Scorekeeper(named).shown(rows_of(ALONE, rows([0.0, 1.0])))
    assert (score.probability, score.value) == (1.0, None)


# Recurrent shadows


def remembering() -> Any:
    recurrent = {"states": [{"input": "h", "output": "h_out", "shape": [1]}]}
    return version(METRICS, "s", counter(), golden_outputs=[[0.0, 1.0], [0.0, 1.0]], recurrent=recurrent)


def steps(*of: tuple[str | None, int | None]) -> Rows:
    batch = [Row(state=[0.0, 1.0], episode=episode, step=number) for episode, number in of]
    return rows_of(ALONE, batch)


def counts(found: list[Any]) -> list[float]:
    """How many steps the network remembers, which is what it says action 0 is worth."""
    return [score.expected if np.frombuffer(score.target)[0] else 1.0 - score.expected for score in found]


def test_a_recurrent_shadow_remembers_episodes_by_itself() -> None:
    keeper = Scorekeeper(remembering())
    found = keeper.shown(steps(("e", 0), ("f", 0), ("e", 1), ("e", 2)))
    found += keeper.shown(steps(("e", 3), ("f", 1), ("e", 3)))
    assert counts(found) == [0.0, 0.0, 1.0, 2.0, 3.0, 1.0, 3.0]
    assert [score.fault for score in found] == [""] * 7


def test_what_a_recurrent_shadow_cannot_place_is_left_out_and_counted() -> None:
    keeper = Scorekeeper(remembering())
    odd_ones = [(None, 0), ("e", None), ("late", 5), ("e", 0), ("e", 2)]
    found = keeper.shown(steps(*odd_ones))
    assert counts(found) == [0.0]
    assert keeper.runner.totals.dropped["memory"] == 4
    assert keeper.shown(steps(("late", 6))) == []


def test_a_recurrent_step_that_fails_ends_its_episode() -> None:
    keeper = Scorekeeper(remembering())
    keeper.shown(steps(("e", 0), ("f", 0)))
    broken = steps(("e", 1))
    broken = Rows(**{**{f: getattr(broken, f) for f in Rows.__slots__}, "states": np.zeros((1, 9), np.float32)})
    (score,) = keeper.shown(broken)
    assert score.fault == "inference_failed"
    assert keeper.shown(steps(("e", 2))) == []
    assert counts(keeper.shown(steps(("f", 1)))) == [1.0]


def test_memories_are_bounded_and_not_finite_ones_forgotten() -> None:
    one = np.ones(4, np.float32)
    episodes = Episodes(most_bytes=3 * (OVERHEAD_BYTES + 32))
    for name in "abcd":
        episodes.keep(name, 0, one, one)
    assert len(episodes) == 3
    assert episodes.before("a", 1, one) is None
    episodes.keep("d", 1, one, one * np.nan)
    assert len(episodes) == 2
    episodes.forget("nobody")
    assert waves([None, "a", "a", None, "b", "a"]) == [[0, 1, 3, 4], [2], [5]]


def test_its_thread_works_by_itself_and_ends() -> None:
    keeper = Scorekeeper(honest())
    keeper.runner.start("s")
    for _ in range(30):
        keeper.runner.offer_nowait(rows_of(ALONE, rows([0.0, 1.0])))
    until(lambda: len(keeper.scores) == 30, "the scores")
    assert len(keeper.calls_s) == keeper.runner.totals.calls
    assert any(thread.name == "shadow-s" for thread in threading.enumerate())
    keeper.runner.close()
    assert keeper.runner.join(10.0)
    assert keeper.runner.statistics().status == "closed"
