"""Clients under load: threads that act and reward at a given rate, in short episodes, and write a journal.

Duty: HTTP by hand over kept-alive connections, one for each player; what fails is written down and gone around: the
episode is given up, a reward is sent again. They judge nothing.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.faults.journal import Act, Failure, Journal, Reward
from tests.faults.policy import some_request
from tests.waiting import until

TIMEOUT_S = 30.0
PATIENCE_S = 600.0  # a slow machine breaks no promise


@dataclass(frozen=True)
class Habits:
    rate: float = 60.0  # acts per second over all players; each is followed by its reward
    players: int = 6
    steps: int = 4  # of an episode
    rewarded: float = 0.95  # share of decisions that are rewarded at all
    tries: int = 20  # of one reward
    pause_s: float = 0.25  # between them


@dataclass
class Line:
    """One kept-alive connection, to one of several addresses: the next one after a failure."""

    urls: Sequence[str]
    at: int
    journal: Journal
    _connection: http.client.HTTPConnection | None = None

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Give status and body; status 0 where the connection broke."""
        try:
            status, headers, answer = self._send(path, json.dumps(body))
        except (OSError, http.client.HTTPException) as error:
            self.close()
            self.at += 1
            self._note(path, 0, type(error).__name__)
            return 0, {}
        found: dict[str, Any] = json.loads(answer)
        if status >= 300:
            self._note(path, status, found["code"], headers.get("Retry-After"))
        return status, found

    def _send(self, path: str, body: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        if self._connection is None:
            where = urlsplit(self.urls[self.at % len(self.urls)])
            self._connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=TIMEOUT_S)
        self._connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        answer = response.read()
        if response.will_close:
            self.close()
        return response.status, response.headers, answer

    def _note(self, path: str, status: int, code: str, retry_after: str | None = None) -> None:
        with self.journal.lock:
            self.journal.failures.append(Failure(path, status, code, time.monotonic(), retry_after))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@dataclass
class Player:
    name: str
    policy: str
    line: Line
    habits: Habits
    chance: random.Random
    stop: threading.Event
    _due_s: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        number = 0
        while not self.stop.is_set():
            number += 1
            self._episode(f"{self.name}-{number}")
        self.line.close()

    def _episode(self, episode: str) -> None:
        """Play one episode to its end, also when told to stop: what is left open waits for its deadline."""
        for step in range(self.habits.steps):
            self._pace()
            decision = self._act(episode, step)
            if decision is None:
                return
            if self.chance.random() < self.habits.rewarded:
                self._reward(decision, step == self.habits.steps - 1)

    def _pace(self) -> None:
        """Wait until the next act is due; after a stall start anew, without a burst."""
        now_s = time.monotonic()
        self._due_s = max(self._due_s + self.habits.players / self.habits.rate, now_s - 0.5)
        if self._due_s > now_s:
            self.stop.wait(self._due_s - now_s)

    def _act(self, episode: str, step: int) -> str | None:
        request = some_request(self.chance)
        act = Act(request, time.monotonic())
        with self.line.journal.lock:
            self.line.journal.acts[episode, step] = act
        body = {"policy": self.policy, "episode": episode, "step": step, "include": ["distribution"], **request}
        status, answer = self.line.post("/v1/act", body)
        if status != 200:
            self.stop.wait(0.05)
            return None
        act.here_s = time.monotonic()
        act.answer = answer
        return str(answer["decision_id"])

    def _reward(self, decision: str, last: bool) -> None:
        reward = Reward(self.chance.random())
        with self.line.journal.lock:
            self.line.journal.rewards[decision] = reward
        body = {"decision_id": decision, "reward": reward.value, "terminated": last}
        for _ in range(self.habits.tries):
            status, answer = self.line.post("/v1/reward", body)
            if status == 202:
                reward.statuses.append(str(answer["status"]))
                return
            if status not in (0, 503) or self.stop.wait(self.habits.pause_s):
                return


@dataclass
class Game:
    """Players at work."""

    journal: Journal
    threads: list[threading.Thread]
    stop: threading.Event
    raised: list[BaseException]

    def more(self, acts: int) -> None:
        """Wait until so many more acts have been answered."""
        enough = self.journal.answered + acts
        until(lambda: self.journal.answered >= enough or not self.alive, "traffic", PATIENCE_S)
        assert self.alive, self.raised

    @property
    def alive(self) -> bool:
        return any(thread.is_alive() for thread in self.threads)


@contextmanager
def playing(urls: Sequence[str], policy: str, journal: Journal, habits: Habits, seed: int) -> Iterator[Game]:
    """Let players play until the block ends; what one of them raises is raised here then."""
    stop, raised = threading.Event(), list[BaseException]()
    players = [
        Player(
            f"{seed}-{k}-{len(journal.acts)}",
            policy,
            Line(urls, k, journal),
            habits,
            random.Random(seed * 1000 + k),
            stop,
        )
        for k in range(habits.players)
    ]
    threads = [threading.Thread(target=_noting(player.run, raised), name=player.name) for player in players]
    for thread in threads:
        thread.start()
    try:
        yield Game(journal, threads, stop, raised)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if raised:
        raise raised[0]


def _noting(run: Callable[[], None], raised: list[BaseException]) -> Callable[[], None]:
    def noting() -> None:
        try:
            run()
        except BaseException as error:
            raised.append(error)

    return noting
