"""One row, once: warm the server up, drive it, and note what it cost.

Duty: from a running server and a load to the figures of one repetition. It compares nothing.
Strategy: processor time is read before the load and again when the server has handed on what it acknowledged, so that
work behind the answers counts, too; the look at its metrics that tells so does not. What other programs took meanwhile
is noted with the figures: they say how far to trust these.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests import bodies, processes, wrk
from loadtests.bodies import Asking
from loadtests.cases import OVERLOAD, PEAK_CONNECTIONS, Entry
from loadtests.networks import EPSILON, NETWORKS
from loadtests.open_loop import OpenLoop
from loadtests.results import Sample
from loadtests.servers import Running, post, total

SETTLE_S = 10.0
LOOK_EVERY_S = 0.1
AMISS = {"fell back": "fallbacks", "not recorded": "unlogged_decisions"}
WARM_RATE, WARM_CONNECTIONS, WARM_PATIENCE_S = 1000.0, 64, 0.5
# A caller's patience with an overloaded server; twice the deadline, so that refusals that the server gives are seen.
PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how hard. rate: requests a second of open loops."""

    seconds: float
    warm_s: float
    rate: float


def asking(entry: Entry) -> Asking:
    """What is posted in a row."""
    network = NETWORKS[entry.spec.network]
    if entry.load.rows:
        return bodies.batches(network, entry.load.rows)
    if entry.spec.kind == "mlserver":
        return bodies.inferences(network)
    return bodies.acts(network, raw=entry.load.raw)


def measure(server: Running, entry: Entry, settings: Settings, folder: Path) -> Sample:
    """Measure a row once. Raises RuntimeError when there are no figures."""
    asked = asking(entry)
    check(server, asked)
    warm(server, asked, min(entry.load.connections, WARM_CONNECTIONS), settings)
    settle(server)
    watch = Watch(server)
    if entry.load.kind == "closed":
        figures = _closed(server, entry, asked, settings, folder)
    elif entry.load.kind == "open":
        figures = _open(server, entry, asked, settings)
    else:
        figures = _overload(server, entry, asked, settings, folder)
    return {**figures, **watch.costs(max(figures["decisions"], 1.0))}


def check(server: Running, asked: Asking) -> None:
    """See to it that it is decisions that are measured: recorded and explored, where Surefoot answers.

    Raises RuntimeError when it is refusals, fallbacks, or half of the work, and stays so for a while.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        status, text = post(server.port, asked.path, asked.bodies[0], asked.headers)
        if status == 200 and (server.spec.kind != "surefoot" or _whole(json.loads(text))):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{server.spec.name} answers {status}: {text[:500]}")
        time.sleep(LOOK_EVERY_S)


def _whole(answer: dict[str, Any]) -> bool:
    """Tell whether an answer, or each row of a batch's columns, is a decision with everything that belongs to it."""
    if isinstance(answer["action"], list):
        return all(answer["logged"]) and not any(answer["fallback"]) and set(answer["epsilon"]) == {EPSILON}
    explored = answer["exploration"]["epsilon"] == EPSILON
    return bool(answer["logged"]) and answer["fallback"] is None and explored


def warm(server: Running, asked: Asking, connections: int, settings: Settings) -> None:
    """Ask for a while, and forget the answers."""
    OpenLoop(server.port, asked.requests(), connections, WARM_PATIENCE_S).run(WARM_RATE, settings.warm_s)


def start_figures(server: Running, entry: Entry, settings: Settings) -> Sample:
    """How long the start took, and the memory, once it has answered for a while."""
    warm(server, asking(entry), entry.load.connections, settings)
    return {"ready_s": server.ready_s, "ready_cpu_s": server.ready_cpu_s, "peak_mb": server.peak_mb()}


def settle(server: Running, patience_s: float = SETTLE_S) -> tuple[float, float]:
    """Wait until what was acknowledged has been handed on. Goes on after a while: then the row says what it cost.

    Gives the processor time of server and store by then, before the look that showed it.
    """
    deadline = time.monotonic() + patience_s
    while True:
        if server.spec.kind == "surefoot":
            time.sleep(LOOK_EVERY_S)  # twice what events wait before they are shipped: mostly one look is enough
        used_s = server.cpu_s()
        if not server.unshipped() or time.monotonic() > deadline:
            return used_s


def _closed(server: Running, entry: Entry, asked: Asking, settings: Settings, folder: Path) -> dict[str, float]:
    script = wrk.write_script(folder, asked.path, asked.headers, asked.bodies)
    found = wrk.run(wrk.command(server.port, script, entry.load.connections, settings.seconds))
    return {
        "per_s": found.per_s * asked.rows,
        "decisions": float((found.requests - found.refused) * asked.rows),
        "p50_us": float(found.p50_us),
        "p99_us": float(found.p99_us),
        "p999_us": float(found.p999_us),
        "refused": float(found.refused),
        "failed": float(found.failed),
    }


def _open(
    server: Running, entry: Entry, asked: Asking, settings: Settings, rate: float = 0.0, patience_s: float = 5.0
) -> dict[str, float]:
    loop = OpenLoop(server.port, asked.requests(), entry.load.connections, patience_s)
    found = loop.run(rate or settings.rate, settings.seconds)
    figures = {
        "per_s": found.per_s,
        "rate": rate or settings.rate,
        "decisions": float(found.answered),
        "refused": float(found.refused),
        "failed": float(found.failed + found.unanswered),
        "given up": float(found.given_up),
        "late": found.late / found.intended,
    }
    if found.answered:
        both = found.latency, found.service
        figures |= {"p50_us": both[0].p50_us, "p99_us": both[0].p99_us, "p999_us": both[0].p999_us}
        figures |= {"service_p50_us": both[1].p50_us, "service_p99_us": both[1].p99_us}
    return figures


def _overload(server: Running, entry: Entry, asked: Asking, settings: Settings, folder: Path) -> dict[str, float]:
    """The peak first, by wrk, then ten times as much; both count as decisions."""
    script = wrk.write_script(folder, asked.path, asked.headers, asked.bodies)
    peak = wrk.run(wrk.command(server.port, script, PEAK_CONNECTIONS, settings.seconds))
    settle(server)
    figures = _open(server, entry, asked, settings, OVERLOAD * peak.per_s, PATIENCE_S)
    figures["goodput"] = figures["per_s"] / peak.per_s
    figures["peak_per_s"] = peak.per_s
    figures["decisions"] += peak.requests - peak.refused
    return figures


def _amiss(server: Running) -> dict[str, float]:
    """Answers of Surefoot so far that were less work than a decision, by what report.py calls them."""
    if server.spec.kind != "surefoot":
        return {}
    metrics = server.metrics()
    return {name: total(metrics, f"surefoot_{metric}_total") for name, metric in AMISS.items()}


class Watch:
    """Processor time from its making on: of the server, of its store, of this side, of everybody else."""

    def __init__(self, server: Running) -> None:
        self._server = server
        self._amiss = _amiss(server)
        self._before = server.cpu_s()
        self._others_s = self._elsewhere_s()
        self._began_s = time.perf_counter()

    def costs(self, decisions: float) -> dict[str, float]:
        """For each of so many decisions, once the server has handed them on."""
        mine, store = (now - then for now, then in zip(settle(self._server), self._before, strict=True))
        lasted_s = time.perf_counter() - self._began_s
        return {
            "cpu_us": 1e6 * mine / decisions,
            "store_cpu_us": 1e6 * store / decisions,
            "peak_mb": self._server.peak_mb(),
            "elsewhere": max(0.0, self._elsewhere_s() - self._others_s) / lasted_s,
            **{name: number - self._amiss[name] for name, number in _amiss(self._server).items()},
        }

    def _elsewhere_s(self) -> float:
        """Of everything that runs, what is neither this side's, nor wrk's, nor the server's."""
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        ours = sum(usage.ru_utime + usage.ru_stime for usage in usages)
        return processes.machine_busy_s() - ours - sum(self._server.cpu_s())
