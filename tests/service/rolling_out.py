"""Traffic for rollouts, for tests: decisions on a real service, each rewarded by what its action is worth."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

import httpx

from tests.service.admins import STATE, Admin

BATCH = 64


class Traffic:
    """Batches of decisions, one after the other, until it is stopped.

    worth: of an action. columns: of the batch, made of the numbers of batch and row.
    """

    def __init__(self, admin: Admin, policy: str, worth: Callable[[Any], float], **columns: Any) -> None:
        self._admin, self._policy, self._worth, self._columns = admin, policy, worth, columns
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.versions: Counter[str] = Counter()
        self.answers: list[dict[str, Any]] = []
        self.failures: list[str] = []

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self.failures == []

    def _run(self) -> None:
        with httpx.Client(base_url=self._admin.server.url, timeout=30) as http:
            for number in count():
                if self._stop.is_set():
                    return
                try:
                    self._once(http, number)
                except Exception as error:
                    self.failures.append(repr(error))
                    return

    def _once(self, http: httpx.Client, number: int) -> None:
        columns = {name: [make(number, i) for i in range(BATCH)] for name, make in self._columns.items()}
        body = {"policy": self._policy, "states": [STATE] * BATCH} | columns
        answer = http.post("/v1/act/batch", json=body)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        self.versions.update(told["version"])
        rewards = [
            {"decision_id": decision, "reward": self._worth(action)}
            for decision, action in zip(told["decision_id"], told["action"], strict=True)
        ]
        answer = http.post("/v1/reward/batch", json={"rewards": rewards})
        assert answer.status_code in (200, 202), answer.text
