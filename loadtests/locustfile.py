"""Load for a running service: users that act on CartPole-like states, reward each action and end their episodes.

    locust -f loadtests/locustfile.py --headless -u 16 -r 16 -t 60s -H http://127.0.0.1:8080

Duty: keep the service busy with correct traffic, and check each answer: the propensity is a probability, the action
is in the space, the decision was logged, the reward was taken. A wrong answer is a failure, whatever its status.
It speaks HTTP alone and imports nothing of the service.
Strategy: a user holds `--batch` lanes. A lane is an episode with a key of its own; its states are drawn uniformly
within CartPole's bounds, and it ends after a random number of steps. One lane uses the single routes, more use the
batch routes.
Promise: the exit code is 1 when nothing was asked, when a user crashed, or when more than `--max-fail-ratio` of the
requests failed. Locust waits for each answer before it asks again, so its latencies leave out the waiting that an
overloaded service causes: read throughput and correctness here, not tail latency.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from locust import FastHttpUser, constant, events
from locust.exception import StopUser

# Position, velocity, angle, angular velocity. Position and angle end an episode beyond these (Barto, Sutton and
# Anderson 1983, as in Gymnasium's CartPole-v1); velocities have no limit there, and rarely pass these.
STATE_BOUNDS = (2.4, 3.0, 0.2095, 3.5)
LONGEST_EPISODE = 200
TAKEN = frozenset({"joined", "early", "accepted"})

Json = Mapping[str, Any]


@dataclass(slots=True)
class Lane:
    """One episode after the other, under one key."""

    key: str
    episode: str = ""
    step: int = 0
    steps_left: int = 0

    def next_step(self) -> None:
        if self.steps_left == 0:
            self.episode, self.step = uuid.uuid4().hex, -1
            self.steps_left = random.randint(1, LONGEST_EPISODE)
        self.step += 1
        self.steps_left -= 1

    def reward(self, decision_id: str) -> dict[str, Any]:
        return {"decision_id": decision_id, "reward": 1.0, "terminated": self.steps_left == 0}


@dataclass(slots=True)
class Budget:
    """How many decisions a run may still ask for, and how many users still ask; one for each process."""

    left: float
    users: int = 0

    def take(self, count: int) -> bool:
        if self.left < count:
            return False
        self.left -= count
        return True


def random_state() -> list[float]:
    return [random.uniform(-bound, bound) for bound in STATE_BOUNDS]


def act_complaint(answer: Json, actions: int) -> str | None:
    """Say what is wrong with one decision; None when nothing is."""
    propensity, action = answer.get("propensity"), answer.get("action")
    if not answer.get("decision_id"):
        return "no decision_id"
    if not isinstance(propensity, float | int) or isinstance(propensity, bool) or not 0 < propensity <= 1:
        return f"propensity {propensity!r} is not in (0, 1]"
    if not isinstance(action, int) or isinstance(action, bool) or not 0 <= action < actions:
        return f"action {action!r} is not one of {actions}"
    if answer.get("logged") is not True:
        return "the decision was not logged"
    return None


def reward_complaint(answer: Json) -> str | None:
    """Say what is wrong with the verdict on one reward; None when nothing is."""
    if answer.get("status") not in TAKEN:
        return f"the reward is {answer.get('status')!r}"
    return "a fresh reward is called a duplicate" if answer.get("duplicate") else None


def parsed(text: str | None) -> Json | None:
    """Read a JSON object; None when it is anything else."""
    try:
        answer = json.loads(text or "")
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def rows(columns: Json, names: Sequence[str], count: int) -> list[Json] | None:
    """Turn the columns of a batch answer into rows; None when a column is missing or has another length."""
    lists = [columns.get(name) for name in names]
    if any(not isinstance(column, list) or len(column) != count for column in lists):
        return None
    return [dict(zip(names, row, strict=True)) for row in zip(*lists, strict=True)]


def add_arguments(parser: Any) -> None:
    """Each has a variable of its own too: `--max-fail-ratio` is `LOCUST_MAX_FAIL_RATIO`."""

    def add(name: str, default: float | str, text: str) -> None:
        variable = "LOCUST_" + name.upper().replace("-", "_")
        parser.add_argument(f"--{name}", env_var=variable, type=type(default), default=default, help=text)

    add("policy", "", "policy to ask; empty: the only one loaded")
    add("actions", 2, "size of its action space")
    add("batch", 1, "states per request")
    add("decisions", 0, "stop after so many per process; 0: never")
    add("max-fail-ratio", 0.0, "share of failed requests that still exits with 0")
    parser.add_argument("--token", env_var="SUREFOOT_CLIENT_TOKEN", default="", is_secret=True, help="bearer token")


def set_budget(environment: Any, **_: Any) -> None:
    decisions = environment.parsed_options.decisions
    environment.decision_budget = Budget(decisions or float("inf"))


def set_exit_code(environment: Any, **_: Any) -> None:
    total = environment.stats.total
    crashed = bool(environment.runner and environment.runner.exceptions)
    wrong = total.num_requests == 0 or crashed or total.fail_ratio > environment.parsed_options.max_fail_ratio
    environment.process_exit_code = 1 if wrong else 0


class Player(FastHttpUser):  # type: ignore[misc]
    """Acts and rewards as fast as it is answered."""

    wait_time = constant(0)

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.environment.decision_budget.users += 1
        self.actions: int = options.actions
        self.policy = {"policy": options.policy} if options.policy else {}
        self.headers = {"Authorization": f"Bearer {options.token}"} if options.token else {}
        self.lanes = [Lane(key=uuid.uuid4().hex) for _ in range(options.batch)]

    def on_stop(self) -> None:
        """End the run with its last user, so that no request is cut off and each reward is sent."""
        budget = self.environment.decision_budget
        budget.users -= 1
        if budget.users == 0:
            self.environment.runner.quit()

    def play(self) -> None:
        if not self.environment.decision_budget.take(len(self.lanes)):
            raise StopUser
        for lane in self.lanes:
            lane.next_step()
        if len(self.lanes) == 1:
            self.play_one(self.lanes[0])
        else:
            self.play_batch()

    def play_one(self, lane: Lane) -> None:
        body = {"state": random_state(), "key": lane.key, "episode": lane.episode, "step": lane.step, **self.policy}
        decision = self.ask("/v1/act", body, 200, lambda answer: act_complaint(answer, self.actions))
        if decision is not None:
            self.ask("/v1/reward", lane.reward(decision["decision_id"]), 202, reward_complaint)

    def play_batch(self) -> None:
        body = {
            "states": [random_state() for _ in self.lanes],
            "keys": [lane.key for lane in self.lanes],
            "episodes": [lane.episode for lane in self.lanes],
            "steps": [lane.step for lane in self.lanes],
            **self.policy,
        }
        columns = self.ask("/v1/act/batch", body, 200, self.batch_complaint)
        if columns is not None:
            pairs = zip(self.lanes, columns["decision_id"], strict=True)
            rewards = [lane.reward(decision_id) for lane, decision_id in pairs]
            self.ask("/v1/reward/batch", {"rewards": rewards}, 202, self.rewards_complaint)

    def batch_complaint(self, columns: Json) -> str | None:
        decisions = rows(columns, ("decision_id", "action", "propensity", "logged"), len(self.lanes))
        if decisions is None:
            return "the columns do not have one element per state"
        return next(filter(None, (act_complaint(row, self.actions) for row in decisions)), None)

    def rewards_complaint(self, answer: Json) -> str | None:
        results = answer.get("results")
        if not isinstance(results, list) or len(results) != len(self.lanes):
            return "the results do not have one element per reward"
        return next(filter(None, map(reward_complaint, results)), None)

    def ask(self, path: str, body: Json, status: int, complaint: Any) -> Json | None:
        """Post and check; None when the answer counts as a failure."""
        with self.client.post(path, json=body, headers=self.headers, catch_response=True) as response:
            answer = parsed(response.text)
            if response.status_code != status or answer is None:
                response.failure(f"{response.status_code}: {response.text or response.error}"[:200])
                return None
            wrong = complaint(answer)
            if wrong:
                response.failure(wrong)
                return None
            return answer

    tasks = [play]  # noqa: RUF012  Locust reads it so


events.init_command_line_parser.add_listener(add_arguments)
events.init.add_listener(set_budget)
events.quitting.add_listener(set_exit_code)
