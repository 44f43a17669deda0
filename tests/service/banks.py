"""The real bank of exploration under a clock that tests move, and replicas that record what they decide."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import redis
from msgspec.structs import replace

from policies.types import Floats
from safety.bank import Reply, Request
from safety.budget import millionths
from safety.exploration import MICRO, Exploration, Kind
from safety.lease import Holder
from service.leases import BANK, decode, encode
from service.redis_streams import base

START_MS = 1_800_000_000_000


@dataclass
class Bank:
    """`leases.lua` in a real server, for one policy. Its clock is `now_ms`."""

    store: redis.Redis
    policy: str
    now_ms: int = START_MS
    highest_ms: int = START_MS

    def call(self, request: Request) -> Reply | None:
        self.highest_ms = max(self.highest_ms, self.now_ms)
        raw = self.store.eval(BANK.decode(), 1, base(self.policy), encode(replace(request, now_ms=self.now_ms)))
        assert isinstance(raw, bytes)
        return decode(raw)

    def stored(self) -> list[bytes]:
        found: Any = self.store.keys(f"{base(self.policy)}:*")
        return list(found)

    def forget(self) -> None:
        """Lose all memory, as a server without persistence does that is started again."""
        if keys := self.stored():
            self.store.delete(*keys)

    def save(self) -> dict[bytes, bytes]:
        dump: Any = self.store.dump
        return {key: dump(key) for key in self.stored()}

    def restore(self, saved: dict[bytes, bytes]) -> None:
        self.forget()
        for key, value in saved.items():
            self.store.restore(key, 0, value)


@dataclass
class Record:
    """What trainers could read: for each window, decisions, explored ones, and what these cost in millionths."""

    decisions: Counter[tuple[Kind, str]] = field(default_factory=Counter)
    explored: Counter[tuple[Kind, str]] = field(default_factory=Counter)
    paid: Counter[tuple[Kind, str]] = field(default_factory=Counter)
    without_lease: int = 0

    def excess(self, exploration: Exploration) -> dict[tuple[Kind, str], float]:
        """Windows in which a cap was passed, with what was spent."""
        found: dict[tuple[Kind, str], float] = {}
        for window, count in self.explored.items():
            if window[0] == "rate" and exploration.rate and count > exploration.rate.limit:
                found[window] = count
            if window[0] == "share" and exploration.share and count > exploration.share.limit * self.decisions[window]:
                found[window] = count / self.decisions[window]
            if window[0] == "regret" and exploration.regret and self.paid[window] > exploration.regret.limit * MICRO:
                found[window] = self.paid[window] / MICRO
        return found


@dataclass
class Replica:
    """A worker with a holder, and a monotonic clock of its own that the test may turn."""

    holder: Holder
    bank: Bank
    record: Record
    random: random.Random
    clock_s: float = 0.0

    def decide(self, rows: int, wanted: float, worst: float = 1.0, unlucky: bool = False) -> int:
        """Decide on a batch, and record it as a ledger does. Give how many rows explored.

        unlucky: every row that may explore does, and draws its worst action.
        """
        u0 = np.zeros(rows) if unlucky else self._uniform(rows, 0.0, 1.0)
        most = self._uniform(rows, 0.01, worst)
        settled = self.holder.allot(self.clock_s, np.full(rows, wanted), u0, most, most / 2)
        explored = u0 < settled.epsilon
        paid = most if unlucky else np.maximum(0.01, most * self._uniform(rows, 0.0, 1.0))
        self.holder.spend(settled, explored, paid)
        for kind, window in settled.windows.items():
            self.record.decisions[kind, window] += rows
            self.record.explored[kind, window] += int(explored.sum())
            self.record.paid[kind, window] += int(millionths(paid)[explored].sum())
        self.record.without_lease += int(explored.sum()) if not settled.windows else 0
        return int(explored.sum())

    def renew(self) -> bool:
        """Ask the bank and take its answer, if there is a right one."""
        reply = self.bank.call(self.holder.ask(self.clock_s))
        if reply is None:
            self.holder.failed(self.clock_s)
        else:
            self.holder.granted(reply)
        return reply is not None

    def _uniform(self, rows: int, low: float, high: float) -> Floats:
        return np.array([self.random.uniform(low, high) for _ in range(rows)])


@dataclass
class Fleet:
    """Replicas under steady load, in steps of manual time."""

    bank: Bank
    exploration: Exploration
    seed: int = 0
    record: Record = field(default_factory=Record)
    replicas: list[Replica] = field(default_factory=list)
    _born: int = 0

    def add(self) -> Replica:
        self._born += 1
        holder = Holder(f"{self.seed}-{self._born}", self.exploration, 1)
        replica = Replica(holder, self.bank, self.record, random.Random(f"{self.seed}/{self._born}"))
        replica.clock_s = replica.random.uniform(0, 1e6)
        self.replicas.append(replica)
        return replica

    def pass_ms(self, ms: int) -> None:
        self.bank.now_ms += ms
        for replica in self.replicas:
            replica.clock_s += ms / 1000

    def play(self, until_ms: int, step_ms: int, per_s: float, wanted: float, worst: float = 1.0) -> None:
        """Decide `per_s` times a second on each replica, renewing what is due."""
        debt: dict[int, float] = defaultdict(float)
        while self.bank.now_ms < until_ms:
            self.pass_ms(step_ms)
            for index, replica in enumerate(self.replicas):
                if replica.holder.due_s <= replica.clock_s:
                    replica.renew()
                debt[index] += per_s * step_ms / 1000
                while debt[index] >= 1.0:
                    debt[index] -= 1.0
                    replica.decide(1, wanted, worst)


class World:
    """Replicas that decide, renew, die, are cut off and lose answers; clocks that jump; a bank that forgets."""

    def __init__(self, store: redis.Redis, policy: str, exploration: Exploration, seed: int, count: int = 3) -> None:
        self.exploration = exploration
        self.bank = Bank(store, policy)
        self.fleet = Fleet(self.bank, exploration, seed)
        self.late: list[Request] = []  # requests that lie in a socket's buffer somewhere
        for _ in range(count):
            self.fleet.add()

    def some(self, index: int) -> Replica:
        return self.fleet.replicas[index % len(self.fleet.replicas)]

    def decide(self, index: int, rows: int, worst: float, unlucky: bool) -> None:
        self.some(index).decide(rows, 0.5, worst, unlucky)

    def renew(self, index: int, rows: int) -> None:
        """Decisions go on while the answer is under way."""
        replica = self.some(index)
        reply = self.bank.call(replica.holder.ask(replica.clock_s))
        replica.decide(rows, 1.0, unlucky=True)
        if reply is None:
            replica.holder.failed(replica.clock_s)
        else:
            replica.holder.granted(reply)

    def cut_off(self, index: int, applied: bool, rows: int) -> None:
        """The request is lost, or only its answer is."""
        replica = self.some(index)
        request = replica.holder.ask(replica.clock_s)
        if applied:
            self.bank.call(request)
        replica.decide(rows, 1.0, unlucky=True)
        replica.holder.failed(replica.clock_s)

    def delay(self, index: int) -> None:
        """The holder gives up; its request arrives later, perhaps after those that it sends next."""
        replica = self.some(index)
        self.late.append(replica.holder.ask(replica.clock_s))
        replica.holder.failed(replica.clock_s)

    def overtake(self, index: int, rows: int) -> None:
        """A request arrives after the next one, whose portion has been used up meanwhile; others ask then."""
        self.delay(index)
        self.some(index).renew()
        self.some(index).decide(rows, 1.0, unlucky=True)
        self.arrive(-1)
        for _ in range(2):
            self.renew(index + 1, rows)
            self.some(index + 1).decide(rows, 1.0, unlucky=True)

    def arrive(self, which: int) -> None:
        if self.late:
            self.bank.call(self.late.pop(which % len(self.late)))

    def die(self, index: int) -> None:
        self.fleet.replicas.remove(self.some(index))
        self.fleet.add()

    def leave(self, index: int, delivered: bool) -> None:
        replica = self.some(index)
        request = replica.holder.release(replica.clock_s)
        if delivered:
            self.bank.call(request)
        assert replica.decide(20, 1.0, unlucky=True) == 0
        self.die(index)

    def wait(self, ms: int) -> None:
        self.fleet.pass_ms(ms)

    def turn_a_replicas_clock(self, index: int, seconds: float) -> None:
        self.some(index).clock_s += seconds

    def turn_the_banks_clock(self, ms: int) -> None:
        self.bank.now_ms += ms

    def lose_memory(self) -> None:
        """Only where a budget starts with the next window is a cap promised to hold through that.

        A clock that is set back by a server without memory is more than anybody could notice: time goes on from where
        it was.
        """
        if self.exploration.start == "next_window":
            self.bank.forget()
            self.bank.now_ms = self.bank.highest_ms
            self.fleet.add().renew()
            self.fleet.replicas.pop()

    def check(self) -> None:
        assert not self.fleet.record.excess(self.exploration)
        assert self.fleet.record.without_lease == 0

    def one_of_many_things(self, random: random.Random) -> None:
        """Do something, what is usual more often."""
        index, rows = random.randrange(3), random.choice([1, 3, 10, 40])
        chance = random.random()
        if chance < 0.35:
            self.decide(index, rows, random.choice([0.01, 0.2, 1.0]), random.random() < 0.7)
        elif chance < 0.65:
            self.renew(index, rows)
        elif chance < 0.80:
            self.wait(random.choice([1, 10, 100, 300, 700, 2_100, 9_000, 15_000]))
        else:
            self._mishap(index, rows, random)

    def _mishap(self, index: int, rows: int, random: random.Random) -> None:
        match random.randrange(9):
            case 0 | 1:
                self.cut_off(index, random.random() < 0.7, rows)
            case 2:
                self.delay(index)
            case 3:
                self.overtake(index, rows)
            case 4:
                self.arrive(random.randrange(100))
            case 5:
                self.leave(index, random.random() < 0.7)
            case 6:
                self.turn_a_replicas_clock(index, random.choice([-3600.0, -5.0, -0.5, 0.5, 12.0, 3600.0]))
            case 7:
                self.turn_the_banks_clock(random.choice([-20_000, -3_000, -100, 3_000]))
            case _:
                self.lose_memory() if random.random() < 0.5 else self.die(index)
