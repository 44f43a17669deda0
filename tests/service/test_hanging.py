"""Networks that hang or burst on a state that no trial has shown: it gets the fallback, and everything goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
from prometheus_client import CollectorRegistry

from service.inference import INLINE_S
from service.metrics import Metrics
from service.wire import ActResponse
from tests.conftest import children
from tests.policies.growing import BURSTING, ENDLESS, loop, square
from tests.policies.networks import bundle_files
from tests.service.admins import Admin, serving
from tests.service.pipelines import STATES, decider, plan, recorded, rows, version
from tests.waiting import until


def push(admin: Admin, policy: str, proto: onnx.ModelProto) -> None:
    answer = admin.push(bundle_files(proto, STATES, STATES, policy=policy, exploration=None), policy)
    assert answer.status_code == 201, answer.text


def workers(admin: Admin) -> list[int]:
    assert admin.server.process is not None
    return children(admin.server.process.pid)


def counted(admin: Admin, policy: str, reason: str) -> float:
    """How many rows of a policy got the fallback for this reason, by the metrics."""
    name, labels = "surefoot_fallbacks_total", (f'policy="{policy}"', f'reason="{reason}"')
    lines = admin.http.get("/metrics").text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(name) and all(label in line for label in labels)
    )


def test_a_state_that_makes_a_network_hang_gets_the_fallback_while_others_are_answered(tmp_path: Path) -> None:
    with serving(tmp_path, inference_timeout_s="3", deadline_s="30") as admin, ThreadPoolExecutor(1) as caller:
        push(admin, "looper", loop())
        admin.pushed("toy", "v1", prefers=1)
        before = workers(admin)
        for _ in range(2):
            hanging = caller.submit(admin.act, "looper", state=ENDLESS)
            answered = 0
            while not hanging.done():
                other = admin.act("toy")
                assert (other["fallback"], other["action"]) == (None, 1), other
                answered += 1
            # Were the loop held up, one call would be answered before it and one after.
            assert answered > 20
            late = hanging.result()
            assert (late["fallback"], late["action"], late["propensity"]) == ("inference_timeout", 0, 1.0)
            # The thread is free again some 50 ms later: what comes meanwhile waits for it, and gets its answer.
            on = admin.act("looper", state=[0.0, 1.0])
            assert (on["fallback"], on["action"]) == (None, 1)
        assert counted(admin, "looper", "inference_timeout") == 2
        assert workers(admin) == before, "the worker lives"


def test_a_state_that_bursts_memory_gets_the_fallback_and_the_session_is_opened_again(tmp_path: Path) -> None:
    with serving(tmp_path) as admin, ThreadPoolExecutor(4) as callers:
        push(admin, "burster", square())
        admin.pushed("toy", "v1", prefers=1)
        before = workers(admin)
        bursting = callers.submit(admin.act, "burster", state=BURSTING)
        # Fewer than it takes to open the breaker. They may share the burst's call, or come while the session is away.
        beside = [callers.submit(admin.act, "burster", state=[0.0, 1.0]) for _ in range(3)]
        assert admin.act("toy")["action"] == 1
        assert (bursting.result()["fallback"], bursting.result()["action"]) == ("inference_failed", 0)
        assert {each.result()["fallback"] for each in beside} <= {None, "inference_failed", "session_reopening"}
        until(lambda: "session_reopened" in admin.server.log, "the session")
        answer = admin.act("burster", state=[0.0, 1.0])
        assert (answer["fallback"], answer["action"]) == (None, 1)

        # It is opened anew at most once a second; a burst meanwhile is that call's own affair.
        assert admin.act("burster", state=BURSTING)["fallback"] == "inference_failed"
        until(lambda: admin.act("burster", state=[0.0, 1.0])["fallback"] is None, "an answer of the network")
        assert workers(admin) == before, "the worker lives"


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def test_a_version_taken_for_quick_that_hangs_leaves_the_loop_for_good() -> None:
    async def work() -> None:
        loaded = version(Metrics(CollectorRegistry()), "v1", loop())
        engine = loaded.engine
        engine.may_hang = False  # as if the graph had not told
        engine.predicted_s = lambda rows: 0.0  # type: ignore[method-assign]
        on: list[str] = []
        step = engine.step

        def observed(*given: Any) -> Any:
            on.append(threading.current_thread().name)
            return step(*given)

        engine.step = observed  # type: ignore[assignment, method-assign]
        with decider(plan({"v1": loaded}), timeout_s=1.0) as (pipeline, ledger, _):
            for state in (ENDLESS, STATES[0], STATES[1]):
                (answer,) = await pipeline.decide(rows(state))
                assert isinstance(answer, ActResponse)
                assert answer.fallback == ("inference_timeout" if state is ENDLESS else None)
            assert on[0] == "MainThread"
            assert all(name.startswith("apart") for name in on[1:])
            assert len(recorded(ledger)) == 3

    run(work)


def test_a_version_that_may_hang_never_runs_on_the_loop() -> None:
    loaded = version(Metrics(CollectorRegistry()), "v1", loop())
    assert loaded.engine.predicted_s(1) < INLINE_S
    assert loaded.engine.may_hang
