"""Numbers of several workers: a rule for each, kept when a worker dies, counted once, told by whoever is asked."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import prometheus_client.values
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service import boards
from service.boards import COUNTED, FREE, KEPT, MEASURED, Board, new_board, value_on
from service.merging import RULES, key_of, kind_of, merge, merged_registry
from service.metrics import Metrics
from service.team import Team

MUTEX = prometheus_client.values.ValueClass
Told = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(autouse=True)
def plain_values() -> Iterator[None]:
    yield
    prometheus_client.values.ValueClass = MUTEX


def become(board: Board | None) -> None:
    """Have series begin where this board's worker has them: each test here is several processes in one."""
    prometheus_client.values.ValueClass = MUTEX if board is None else value_on(board, key_of, kind_of)


def metrics_on(board: Board | None) -> Metrics:
    """A worker's metrics, as if its process had just started."""
    become(board)
    if board is not None:
        board.own()
        board.serve()
    return Metrics(CollectorRegistry())


def told(metrics: Metrics, *all_boards: Board) -> Told:
    """What a scrape says; without boards, of one worker alone."""
    registry = asyncio.run(merged_registry(metrics.registry, all_boards)) if all_boards else metrics.registry
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = [sample for family in families for sample in family.samples if not sample.name.endswith("_created")]
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}


def of(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


def test_every_gauge_has_a_rule_and_no_rule_is_left_over() -> None:
    families = list(Metrics(CollectorRegistry()).registry.collect())
    assert {family.name for family in families if family.type == "gauge"} == RULES.keys()
    assert {family.type for family in families} == {"counter", "gauge", "histogram"}


def play(metrics: Metrics, chance: random.Random) -> None:
    """Count this and that. Amounts are halves, whose sums are exact in any order."""
    for _ in range(200):
        version = metrics.version("p", chance.choice(["v1", "v2"]))
        version.decisions["champion"].inc()
        version.duration.observe(chance.choice([0.5, 0.25, 0.0078125, 4.0]))
        metrics.rewards.labels("p", chance.choice(["joined", "early"])).inc()
        metrics.reward_sum.labels("p").inc(chance.choice([-1.5, 0.5]))
        metrics.batch_rows.labels("p").observe(chance.randrange(1, 2000))


def test_what_workers_counted_is_what_one_would_have_counted() -> None:
    two = [Board(new_board()), Board(new_board())]
    workers = [metrics_on(board) for board in two]
    alone = metrics_on(None)
    for seed, (board, worker) in enumerate(zip(two, workers, strict=True)):
        become(board)
        play(worker, random.Random(seed))
        become(None)
        play(alone, random.Random(seed))
    first = told(workers[0], *two)
    assert first == told(workers[1], *two)
    expected = told(alone)
    assert {key: value for key, value in first.items() if key[0] not in RULES} == {
        key: value for key, value in expected.items() if key[0] not in RULES
    }
    total = of("surefoot_reward_sum", policy="p")
    assert first[total] == expected[total]


@pytest.mark.parametrize(
    ("rule", "values", "merged"),
    [
        ("sum", [1.0, 2.0], 3.0),
        ("total", [1.0, 2.0], 3.0),
        ("max", [1.0, 2.0], 2.0),
        ("min", [1.0, 2.0], 1.0),
        ("max", [1.0, math.nan], 1.0),
        ("min", [math.nan, 2.0], 2.0),
        ("max", [math.inf, 2.0], math.inf),
    ],
)
def test_what_is_measured_is_merged_by_its_rule(rule: str, values: list[float], merged: float) -> None:
    assert merge(rule, values) == merged  # type: ignore[arg-type]
    assert math.isnan(merge(rule, [math.nan, math.nan]))  # type: ignore[arg-type]


def test_a_dead_worker_s_counts_stay_and_what_it_measured_goes() -> None:
    descriptor = new_board()
    two = [Board(descriptor), Board(new_board())]
    dying, living = (metrics_on(board) for board in two)
    decisions, total = of("surefoot_audit_entries_total"), of("surefoot_reward_sum", policy="p")
    waiting, up = of("surefoot_ledger_unshipped_events"), of("surefoot_store_up")
    for each, worker in enumerate((dying, living), start=1):
        become(two[each - 1])
        worker.audit_entries.inc(each)
        worker.reward_sum.labels("p").inc(each / 2)
        worker.unshipped.set(10 * each)
    living.store_up.set(1)
    assert [told(living, *two)[key] for key in (decisions, total, waiting, up)] == [3.0, 1.5, 30.0, 0.0]
    two[0].leave()
    two[0].bury()
    assert [told(living, *two)[key] for key in (decisions, total, waiting, up)] == [3.0, 1.5, 20.0, 1.0]
    two[0] = Board(descriptor)
    next_one = metrics_on(two[0])
    next_one.audit_entries.inc(4)
    assert told(next_one, *two)[decisions] == told(living, *two)[decisions] == 7.0
    lives = [next_one]
    for _ in range(50):  # lives that end at once neither count twice nor take more room
        two[0].leave()
        two[0].bury()
        two[0] = Board(descriptor)
        lives.append(metrics_on(two[0]))
    assert told(living, *two)[decisions] == 7.0
    rows = two[0].read()
    assert rows is not None
    assert len(rows) <= 2 * len(two[1].read() or ())


def test_a_worker_that_still_starts_measures_nothing() -> None:
    two = [Board(new_board()), Board(new_board())]
    living = metrics_on(two[0])
    living.store_up.set(1)
    become(two[1])
    starting = Metrics(CollectorRegistry())
    starting.audit_entries.inc()
    seen = told(living, *two)
    assert (seen[of("surefoot_store_up")], seen[of("surefoot_audit_entries_total")]) == (1.0, 1.0)


def test_series_of_a_version_that_is_gone_are_gone_in_all_lives() -> None:
    descriptor = new_board()
    before = Board(descriptor)
    metrics = metrics_on(before)
    metrics.version("p", "v1").explored.inc(5)
    before.leave()
    before.bury()
    board = Board(descriptor)
    worker = metrics_on(board)
    worker.version("p", "v1").explored.inc(2)
    assert told(worker, board)[of("surefoot_explored_total", policy="p", version="v1")] == 7.0
    worker.forget("p", "v1")
    assert not [key for key in told(worker, board) if ("version", "v1") in key[1]]
    worker.version("p", "v1").explored.inc(1)
    assert told(worker, board)[of("surefoot_explored_total", policy="p", version="v1")] == 1.0


def test_a_board_without_room_tells_less_and_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(new_board())
    worker = metrics_on(board)
    monkeypatch.setattr(boards, "SERIES", len(board.read() or ()) + 1)
    for code in ("one", "two", "x" * boards.KEY_BYTES):
        worker.problems.labels(code).inc()
    seen = {key: value for key, value in told(worker, board).items() if key[0] == "surefoot_problems_total"}
    assert seen == {of("surefoot_problems_total", code="one"): 1.0}


COUNT = """
import sys
from service.boards import Board, value_on
from service.merging import key_of, kind_of
board = Board(int(sys.argv[1]))
board.own()
value = value_on(board, key_of, kind_of)("counter", "m", "m_total", (), (), "")
for number in range(10_000_000):
    value.inc(1)
    if number % 64 == 0:
        sys.stdout.write(f"{number + 1}\\n")
        sys.stdout.flush()
"""


def test_nothing_that_a_killed_process_counted_is_lost_or_counted_twice() -> None:
    descriptor = new_board()
    board, at_least, at_most = Board(descriptor), 0, 0
    for life in range(4):
        counting = subprocess.Popen(
            [sys.executable, "-c", COUNT, str(descriptor)], stdout=subprocess.PIPE, text=True, pass_fds=[descriptor]
        )
        assert counting.stdout
        for _ in range(50 + life):
            counting.stdout.readline()
        counting.send_signal(signal.SIGKILL)
        rest = counting.stdout.read().split("\n")
        counting.wait()
        counting.stdout.close()
        acknowledged = int(rest[-2]) if len(rest) > 1 else 64 * (49 + life) + 1
        at_least, at_most = at_least + acknowledged, at_most + acknowledged + 64
        board.bury()
        found = board.read()
        assert found is not None
        assert [number.kind for number in found] == [KEPT]
        assert at_least <= found[0].value <= at_most
    os.close(descriptor)


def test_a_reader_never_takes_one_series_number_for_another_s() -> None:
    board, stop = Board(new_board()), threading.Event()
    board.own()

    def churn() -> None:
        chance = random.Random(1)
        while not stop.is_set():
            held = {}
            for _ in range(chance.randrange(1, 20)):
                number = chance.randrange(1, 100)
                key = b"%d" % number
                index = board.add(key, chance.choice([COUNTED, MEASURED]))
                assert index is not None
                board.values[index] = float(number)
                held[index] = key
            for index, key in held.items():
                board.drop(key, index)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(2_000):
            for number in board.read() or ():
                assert number.kind != FREE
                assert number.value in (0.0, float(number.key))
    finally:
        stop.set()
        thread.join()


def test_a_team_of_one_has_no_board_and_its_metrics_are_its_own() -> None:
    team = Team.of(["0", "3"])
    worker = Metrics(CollectorRegistry())
    team.serve(worker)
    assert (team.size, team.serving, prometheus_client.values.ValueClass) == (1, 1, MUTEX)
    assert asyncio.run(team.registry(worker.registry)) is worker.registry
    assert told(worker)[of("surefoot_worker_restarts")] == 3.0


def test_the_page_tells_every_rule() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `surefoot_")}
    for name, rule in RULES.items():
        assert f"| gauge, {rule} |" in lines[name], name
