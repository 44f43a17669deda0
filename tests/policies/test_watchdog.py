"""Late calls are ended, others are not, and the thread that sees to it exists only while it is needed."""

from __future__ import annotations

import inspect
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest

from policies.bundle import read_bundle
from policies.engine import Engine, Overdue
from policies.watchdog import Watchdog
from service.clock import ManualClock
from tests.policies.growing import ENDLESS, loop, product
from tests.policies.networks import bundle_files, identity_files
from tests.waiting import until

STATES = [[0.0, 1.0], [1.0, 0.0]]


@dataclass(eq=False)
class Call:
    terminate: bool = False


def test_a_call_is_ended_once_its_limit_has_passed() -> None:
    now_s = [0.0]
    watchdog = Watchdog(tick_s=3600.0, monotonic_s=lambda: now_s[0])
    short, long, over = Call(), Call(), Call()
    watchdog.begin(short, 1.0)
    watchdog.begin(long, 5.0)
    watchdog.begin(over, 1.0)
    watchdog.finish(over)
    now_s[0] = 1.0
    watchdog.run_once()
    assert not short.terminate
    now_s[0] = 1.1
    watchdog.run_once()
    assert (short.terminate, long.terminate, over.terminate) == (True, False, False)


def test_its_thread_ends_when_idle_and_comes_back() -> None:
    watchdog = Watchdog(tick_s=0.001, idle_s=0.0)
    assert not watchdog.watching
    for _ in range(3):
        late = Call()
        watchdog.begin(late, 0.0)
        assert watchdog.watching
        until(lambda late=late: late.terminate, "the end of a call")
        assert watchdog.watching, "while a call runs"
        watchdog.finish(late)
        until(lambda: not watchdog.watching, "the end of the thread")


def test_a_call_that_begins_just_when_the_thread_ends_is_seen() -> None:
    late = Call()
    source, first = inspect.getsourcelines(Watchdog._watch)
    (decides,) = [first + i for i, line in enumerate(source) if "> self._idle_s" in line]

    def monotonic_s() -> float:
        """Begin a call between the thread's last look and its end, when it still seems to be there."""
        if sys._getframe(1).f_lineno == decides and not late.terminate:
            assert watchdog.watching
            watchdog.begin(late, -1.0)
        return time.monotonic()

    watchdog = Watchdog(tick_s=0.001, idle_s=0.0, monotonic_s=monotonic_s)
    other = Call()
    watchdog.begin(other, 60.0)
    watchdog.finish(other)
    until(lambda: late.terminate, "the end of the call")
    watchdog.finish(late)
    until(lambda: not watchdog.watching, "the end of the thread")


def test_a_loop_as_long_as_the_state_says_is_ended_and_the_next_call_is_answered() -> None:
    engine = Engine(read_bundle(bundle_files(loop(), STATES, STATES)))
    assert engine.may_hang, "a trial cannot show it, the graph does"
    for _ in range(3):
        with pytest.raises(Overdue, match="toy/v1"):
            engine.step(np.array([ENDLESS], np.float32), None, None, 0.05)
        assert engine.step(np.array(STATES, np.float32), None, None, 60.0)[0].tolist() == STATES


def test_a_single_kernel_runs_to_its_end_and_comes_too_late() -> None:
    engine = Engine(read_bundle(bundle_files(product(), STATES, STATES)), watchdog=Watchdog(tick_s=0.001))
    with pytest.raises(Overdue):
        engine.step(np.array([[2000.0, 0.0]], np.float32), None, None, 0.001)
    assert engine.step(np.array([[2.0, 0.0]], np.float32), None, None, 60.0)[0].tolist() == [[2.0, 0.0]]


def test_a_version_that_was_late_once_is_known_for_it() -> None:
    clock = ManualClock()
    watchdog = Watchdog(tick_s=3600.0, monotonic_s=clock.monotonic_s)
    engine = Engine(read_bundle(identity_files()), watchdog=watchdog)
    states = np.array(STATES, np.float32)
    assert engine.step(states, None, None, 1.0)[0].tolist() == STATES
    assert not engine.may_hang
    network = engine._network
    assert network is not None
    ask = network.ask

    def stall(*given: object) -> object:
        clock.advance(2_000)
        watchdog.run_once()
        return ask(*given)  # type: ignore[arg-type]

    network.ask = stall  # type: ignore[assignment, method-assign]
    with pytest.raises(Overdue):
        engine.step(states, None, None, 1.0)
    assert engine.may_hang
    network.ask = ask
    assert engine.step(states, None, None, 1.0)[0].tolist() == STATES
