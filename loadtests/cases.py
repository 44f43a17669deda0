"""What is measured: groups of servers that are compared with each other, and the loads that they are put under. Pure.

Duty: the table of all rows, and which of them a command line means. It starts nothing.
Strategy: the servers of a group run side by side and take turns, repetition after repetition, so that whatever else the
machine does meets all of them; figures are compared within a group and a load only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

BATCHES = (1, 4, 16, 64, 256, 1024)
CONNECTIONS = (1, 16, 64, 256)
BATCH_CONNECTIONS = 4  # enough that a worker never waits for a caller
OPEN_CONNECTIONS = 64
OVERLOAD = 10.0
OVERLOAD_CONNECTIONS = 1000
PEAK_CONNECTIONS = 64  # a server's peak is what it does for so many


@dataclass(frozen=True, slots=True)
class Spec:
    """A server to start. All but kind and network is about Surefoot alone."""

    name: str
    kind: str = "surefoot"  # or empty, fastapi, or one of PEERS
    network: str = "small"
    durability: str = "process"
    rules: int = 3  # thresholds on a feature
    context_rules: int = 0
    tracing: bool = False
    shadow: bool = False
    policies: int = 1
    limits: int = 0  # rate rules that count each key
    device: str = "cpu"
    max_body_bytes: int = 0  # 0: as the service has it


@dataclass(frozen=True, slots=True)
class Load:
    """How a server is asked.

    kind: closed (wrk), open (constant rate), overload (ten times the peak, open), start (the time until it is ready).
    rows: decisions for each request; above 0 the batch endpoint is asked.
    """

    name: str
    kind: Literal["closed", "open", "overload", "start"] = "closed"
    connections: int = 16
    rows: int = 0
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One row: a server, under a name, and a load."""

    group: str
    label: str
    spec: Spec
    load: Load

    @property
    def name(self) -> str:
        return f"{self.group}/{self.label}/{self.load.name}"


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are measured in turns. references: labels that the others are held against, load by load."""

    name: str
    about: str
    entries: tuple[Entry, ...]
    references: tuple[str, ...]

    def narrowed(self, entries: Sequence[Entry]) -> Group:
        return replace(self, entries=tuple(entries))


CLOSED = {connections: Load(f"c{connections}", connections=connections) for connections in CONNECTIONS}
OPEN = Load("open", "open", OPEN_CONNECTIONS)
EMPTY, FASTAPI, SUREFOOT = Spec("empty", "empty"), Spec("fastapi", "fastapi"), Spec("surefoot")

PEERS = {kind: Spec(kind, kind) for kind in ("litserve", "bentoml", "mlserver", "ray")}


def group(name: str, about: str, specs: dict[str, Spec], loads: Sequence[Load], *references: str) -> Group:
    """All servers under all loads. The first server is the reference unless others are named."""
    entries = [Entry(name, label, spec, load) for load in loads for label, spec in specs.items()]
    return Group(name, about, tuple(entries), references or (next(iter(specs)),))


def _conv() -> Group:
    specs = {"fastapi": replace(FASTAPI, network="conv"), "surefoot": replace(SUREFOOT, network="conv", rules=0)}
    asked = Load("c4", connections=4)
    made = group("conv", "the convolutional network, images of 84x84x4", specs, [asked], "fastapi")
    raw = Entry("conv", "surefoot-raw", specs["surefoot"], replace(asked, raw=True))
    return made.narrowed([*made.entries, raw])


def _batch() -> Group:
    entries = [
        Entry("batch", f"of-{rows}", SUREFOOT, Load(f"c{BATCH_CONNECTIONS}", "closed", BATCH_CONNECTIONS, rows))
        for rows in BATCHES
    ]
    return Group("batch", "/v1/act/batch, decisions a second by size", tuple(entries), ("of-1",))


GROUPS = (
    group(
        "base", "the yardsticks and Surefoot: 3 rules, process, metrics on",
        {"empty": EMPTY, "fastapi": FASTAPI, "surefoot": SUREFOOT}, [*CLOSED.values(), OPEN], "empty", "fastapi",
    ),
    group(
        "durability", "what an answered event survives",
        {tier: replace(SUREFOOT, durability=tier) for tier in ("memory", "process", "node")}, [CLOSED[16], OPEN],
    ),
    group(
        "rules", "number of rules, thresholds on features; the last row: three that need the request's context",
        {
            **{str(n): replace(SUREFOOT, rules=n) for n in (0, 3, 20)},
            "3-context": replace(SUREFOOT, rules=0, context_rules=3),
        },
        [CLOSED[16]],
    ),
    group(
        "watched", "tracing every decision, and a shadow that scores every decision",
        {"plain": SUREFOOT, "tracing": replace(SUREFOOT, tracing=True), "shadow": replace(SUREFOOT, shadow=True)},
        [CLOSED[16], OPEN],
    ),
    _batch(),
    group(
        "medium", "the network 128-512-512-4",
        {"fastapi": replace(FASTAPI, network="medium"), "surefoot": replace(SUREFOOT, network="medium")}, [CLOSED[16]],
    ),
    _conv(),
    group(
        "overload", "ten times the peak, open loop, up to 1,000 connections",
        {"surefoot": SUREFOOT}, [Load("10x", "overload", OVERLOAD_CONNECTIONS)],
    ),
    group(
        "peers", "other servers of models, inference only; those that are installed",
        {"fastapi": FASTAPI, "surefoot": SUREFOOT, **PEERS}, [CLOSED[16], OPEN],
    ),
    group(
        "start", "from nothing to ready with 3 policies, and memory",
        {"surefoot": replace(SUREFOOT, policies=3)}, [Load("cold", "start")],
    ),
)  # fmt: skip
# Rows that a quick run leaves out unless they are named.
SLOW = ("peers/*", "*/c256", "batch/of-4/*", "batch/of-16/*", "batch/of-256/*", "rules/3/*", "rules/3-context/*")


def chosen(only: Sequence[str], *, quick: bool = False, installed: Collection[str] = ()) -> list[Group]:
    """The groups with the rows that are meant: by name, by the beginning of one, or with * and ?; nothing named: all.

    installed: the peers that are; rows of others are left out. Raises ValueError for a name that means no row.
    """
    everything = [entry for each in GROUPS for entry in each.entries]
    for name in only:
        if not any(_means(name, entry) for entry in everything):
            raise ValueError(f"{name} is no row; groups are {', '.join(each.name for each in GROUPS)}")

    def wanted(entry: Entry) -> bool:
        if entry.spec.kind in PEERS and entry.spec.kind not in installed:
            return False
        if only:
            return any(_means(name, entry) for name in only)
        return not (quick and any(fnmatchcase(entry.name, pattern) for pattern in SLOW))

    narrowed = (each.narrowed([entry for entry in each.entries if wanted(entry)]) for each in GROUPS)
    return [each for each in narrowed if each.entries]


def _means(name: str, entry: Entry) -> bool:
    return fnmatchcase(entry.name, name) or entry.name.startswith(name.rstrip("/") + "/")
