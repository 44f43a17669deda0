"""The worker processes of a parent: each has a place, dies and is replaced by itself, and all leave together.

Duty: start, look after, stop. It binds no socket and knows no Valkey. Synchronous; the parent calls `look_after` when
a signal came, and twice a second.
Strategy: the first worker starts alone, and the others when it serves: what a first start tries and fetches is there
for them, and a wrong setting is told once. A worker that dies soon after its start is replaced after a pause that
doubles, so that one that cannot live costs little; the others go on serving.
Promise: no two workers have one place at a time; what a dead one has counted is kept (`boards.py`).
"""

from __future__ import annotations

import os
import socket
import subprocess  # workers are this program again
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from service.boards import Board, new_board

log = structlog.get_logger(__name__)

STARTUP_FAILURE = 3  # uvicorn's exit code when the lifespan could not start
# A start takes a second or two of a core: a worker that never lives costs a few percent of it at the longest pause.
LONGEST_PAUSE_S = 30.0
STEADY_S = 10.0  # who has lived so long did not die of its start


class Worker:
    """One worker process, and the pipe whose closing tells it that the parent is gone."""

    def __init__(self, listener: socket.socket, environment: dict[str, str], place: Place, boards: list[int]) -> None:
        read, self._write = os.pipe()
        said = map(str, (listener.fileno(), read, place.number, place.restarts, *boards))
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "service.worker", *said],
            pass_fds=(listener.fileno(), read, *boards),
            env=environment,  # not an argument: it may hold a password
            start_new_session=True,  # Ctrl-C reaches the parent, which tells the worker
        )
        os.close(read)
        self.started_s = time.monotonic()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def ask_to_leave(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        log.error("worker_killed", pid=self.pid)
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        os.close(self._write)


@dataclass(slots=True)
class Place:
    """What is known of one worker's place. worker: None while nobody has it."""

    number: int
    worker: Worker | None = None
    restarts: int = -1
    pause_s: float = 0.0
    due_s: float = float("-inf")  # not to be filled before


class Crew:
    """All workers. `size` of one has no boards: its metrics are its own."""

    def __init__(self, size: int, listener: socket.socket, environment: dict[str, str], pause_s: float) -> None:
        self._listener = listener
        self._environment = environment
        self._shortest_s = pause_s
        self._descriptors = [new_board() for _ in range(size)] if size > 1 else []
        self._boards = [Board(each) for each in self._descriptors]
        self._places = [Place(number) for number in range(size)]
        self._settled = False  # whether a worker has ever served
        self.hopeless = False  # the first start failed, for a reason that would not change

    def look_after(self) -> None:
        """Note who has died, and start who is missing."""
        now_s = time.monotonic()
        for place in self._places:
            if place.worker is not None and place.worker.exit_code is not None:
                self._bury(place, place.worker, now_s)
        if self.hopeless:
            return
        self._settled = self._settled or any(board.serving for board in self._boards)
        for place in self._places if self._settled else self._places[:1]:
            if place.worker is None and place.due_s <= now_s:
                self._start(place)

    def due_in_s(self, most_s: float) -> float:
        """Say when the next worker is due, in so many seconds at most."""
        due = [place.due_s for place in self._places if place.worker is None]
        return max(0.0, min([most_s, *(each - time.monotonic() for each in due)]))

    def stop(self, timeout_s: float, wait: Callable[[float], None]) -> None:
        """Ask all to drain and leave; kill who does not. wait: sleeps until a signal comes, at most so long."""
        workers = [place.worker for place in self._places if place.worker is not None]
        for worker in workers:
            worker.ask_to_leave()
        deadline = time.monotonic() + timeout_s
        while any(worker.exit_code is None for worker in workers) and time.monotonic() < deadline:
            wait(0.5)
        for worker in workers:
            if worker.exit_code is None:
                worker.kill()
            worker.close()

    def _start(self, place: Place) -> None:
        place.restarts += 1
        place.worker = Worker(self._listener, self._environment, place, self._descriptors)
        log.info("worker_started", worker=place.number, pid=place.worker.pid)

    def _bury(self, place: Place, worker: Worker, now_s: float) -> None:
        code, lived_s = worker.exit_code, now_s - worker.started_s
        worker.close()
        place.worker = None
        steady = lived_s >= STEADY_S
        place.pause_s = self._shortest_s if steady or not place.pause_s else min(2 * place.pause_s, LONGEST_PAUSE_S)
        place.due_s = now_s + place.pause_s
        log.error("worker_died", worker=place.number, exit_code=code, pause_s=place.pause_s)
        if self._boards:
            self._boards[place.number].bury()
        if code == STARTUP_FAILURE and place.restarts == 0 and not self._settled:
            self.hopeless = True  # the reason stands in the log
