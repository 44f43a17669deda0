"""Worlds whose values are known exactly, and logs that versions leave in them: a bandit with keys, and a small MDP.

Everything that a log holds is drawn from recorded distributions; true values come from enumeration and from dynamic
programming, which share no line with the estimators.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from policies.explore import behave
from policies.heads import softmax, target
from policies.types import Bools, Floats, Ints
from shadow.rows import Choices, Rows

Rng = np.random.Generator
Policy = Callable[[Ints, Bools], Floats]  # states or contexts [n], masks [n, A] -> probabilities [n, A]


def greedy(values: Floats) -> Policy:
    """Always the best of what is allowed."""
    return lambda states, masks: behind(target(values[states], "q_values"), masks, 0.0)


def soft(logits: Floats) -> Policy:
    """Softmax of what is allowed."""
    return lambda states, masks: softmax(np.where(masks, logits[states], -np.inf))


def exploring(policy: Policy, epsilon: float) -> Policy:
    """With probability ε one of what is allowed."""
    return lambda states, masks: (
        (1.0 - epsilon) * policy(states, masks) + epsilon * masks / masks.sum(axis=1, keepdims=True)
    )


def behind(distribution: object, masks: Bools, epsilon: float) -> Floats:
    n = len(masks)
    return behave(distribution, masks, np.full(n, epsilon), np.zeros(n, np.int64)).probabilities  # type: ignore[arg-type]


def drawn(rng: Rng, probabilities: Floats) -> Ints:
    """One action of each row."""
    below = np.cumsum(probabilities, axis=1)
    return np.asarray((rng.random(len(below))[:, None] * below[:, -1:] >= below).sum(axis=1))


@dataclass(frozen=True)
class Bandit:
    """Contexts, actions, rules that mask actions at random; keys whose rewards share a shift, pinned to a version."""

    means: Floats  # [S, A] of rewards 0 or 1
    loggers: tuple[Policy, ...]
    weights: tuple[float, ...] = (1.0,)
    allowed: float = 0.8  # each action but the first, which always is
    rows: tuple[int, ...] = (1,)  # of a key, each as likely
    shift: float = 0.0  # of a key's means, up or down
    values: Floats | None = None  # the target's own q, [S, A]
    churn: float = 0.0  # probability with which a key leaves after a reward of 0

    def masks(self) -> list[tuple[Bools, float]]:
        rest = itertools.product([False, True], repeat=self.means.shape[1] - 1)
        chance = {True: self.allowed, False: 1.0 - self.allowed}
        return [(np.array([True, *each]), math.prod(chance[one] for one in each)) for each in rest]

    def value(self, policy: Policy) -> float:
        """Of one decision, over contexts and masks."""
        contexts = np.arange(len(self.means))
        return sum(
            chance * float((policy(contexts, np.tile(mask, (len(contexts), 1))) * self.means).sum(axis=1).mean())
            for mask, chance in self.masks()
        )

    def log(self, rng: Rng, keys: int, policy: Policy, champion: Policy | None = None) -> Log:
        """What `keys` keys leave behind, as an evaluation of `policy` reads it."""
        lengths = rng.choice(self.rows, keys)
        key = np.repeat(np.arange(keys), lengths)
        n = len(key)
        contexts = rng.integers(0, len(self.means), n)
        masks = rng.random((n, self.means.shape[1])) < self.allowed
        masks[:, 0] = True
        version = rng.choice(len(self.weights), keys, p=self.weights)[key]
        scored = np.stack([each(contexts, masks) for each in self.loggers], axis=1)
        behaviours = scored[np.arange(n), version]
        actions = drawn(rng, behaviours)
        moved = self.means[contexts, actions] + self.shift * rng.choice([-1.0, 1.0], keys)[key]
        rewards = (rng.random(n) < moved).astype(np.float64)
        stays = self._stays(rng, rewards, key)
        starts = np.searchsorted(key[stays], np.arange(keys))
        values = None if self.values is None else self.values[contexts]
        features = _features(contexts, len(self.means))
        choices = Choices(actions, policy(contexts, masks), behaviours, features, values)
        first = champion(contexts, masks).argmax(axis=1) if champion else np.full(n, -1)
        return Log(
            [f"key-{i}" for i in range(keys)],
            starts,
            rewards[stays],
            choices.part(stays),
            first[stays],
            scored[stays],
            np.broadcast_to(np.array(self.weights), (int(stays.sum()), len(self.weights))),
        )

    def _stays(self, rng: Rng, rewards: Floats, key: Ints) -> Bools:
        """Rows before a key has left."""
        leaves = (rewards == 0.0) & (rng.random(len(rewards)) < self.churn)
        gone = np.cumsum(leaves) - leaves
        first = np.searchsorted(key, key)
        return np.asarray(gone == gone[first])


@dataclass(frozen=True)
class Log:
    """Columns of a log, before they are rows."""

    names: list[str]
    starts: Ints
    rewards: Floats
    choices: Choices
    champion: Ints
    scored: Floats
    weights: Floats
    known: Bools | None = field(default=None)

    def rows(self) -> Rows:
        return Rows.chosen(
            self.names, self.starts, self.rewards, self.choices, champion=self.champion, known=self.known
        )


@dataclass(frozen=True)
class Mdp:
    """Finite states and actions; an episode starts in state 0 and ends by chance, or after `horizon` steps."""

    moves: Floats  # [S, A, S]
    ends: Floats  # [S, A], probability that the episode ends after the step
    low: Floats  # [S, A], the reward with probability one half
    high: Floats  # [S, A], and with the other
    masks: Bools  # [S, A]
    horizon: int
    gamma: float
    loggers: tuple[Policy, ...]
    weights: tuple[float, ...] = (1.0,)

    def value(self, policy: Policy) -> float:
        """Of an episode: dynamic programming from the end (Bellman 1957)."""
        states = np.arange(len(self.masks))
        probabilities, value = policy(states, self.masks), np.zeros(len(self.masks))
        for _ in range(self.horizon):
            q = (self.low + self.high) / 2.0 + self.gamma * (1.0 - self.ends) * (self.moves @ value)
            value = (probabilities * q).sum(axis=1)
        return float(value[0])

    def advantage(self, policy: Policy) -> float:
        """Of one step of `policy` within the episodes of the first logger, by enumeration over time."""
        states = np.arange(len(self.masks))
        own, other = self.loggers[0](states, self.masks), policy(states, self.masks)
        values, qs = [np.zeros(len(states))], []
        for _ in range(self.horizon):
            qs.append((self.low + self.high) / 2.0 + self.gamma * (1.0 - self.ends) * (self.moves @ values[-1]))
            values.append((own * qs[-1]).sum(axis=1))
        there, gained, rows = np.eye(len(states))[0], 0.0, 0.0
        for q, value in zip(reversed(qs), reversed(values[1:]), strict=True):
            gained += float(there @ ((other * q).sum(axis=1) - value))
            rows += float(there.sum())
            there = np.einsum("s,sa,sa,sat->t", there, own, 1.0 - self.ends, self.moves)
        return gained / rows

    def log(self, rng: Rng, episodes: int, policy: Policy, champion: Policy | None = None) -> Log:
        """What `episodes` episodes leave behind, each of one version, as an evaluation of `policy` reads it."""
        version = rng.choice(len(self.weights), episodes, p=self.weights)
        state, running = np.zeros(episodes, np.int64), np.ones(episodes, np.bool_)
        whos, steps, states, actions, rewards, scores = [], [], [], [], [], []
        for step in range(self.horizon):
            (who,) = np.nonzero(running)
            masks = self.masks[state[who]]
            scored = np.stack([each(state[who], masks) for each in self.loggers], axis=1)
            action = drawn(rng, scored[np.arange(len(who)), version[who]])
            at = (state[who], action)
            whos.append(who)
            steps.append(np.full(len(who), step))
            states.append(state[who])
            actions.append(action)
            rewards.append(np.where(rng.random(len(who)) < 0.5, self.low[at], self.high[at]))
            scores.append(scored)
            running[who] = rng.random(len(who)) >= self.ends[at]
            state[who] = drawn(rng, self.moves[at])
        who = np.concatenate(whos)
        order = np.lexsort((np.concatenate(steps), who))
        return self._log(
            version[who[order]],
            who[order],
            np.concatenate(states)[order],
            np.concatenate(actions)[order],
            np.concatenate(rewards)[order],
            np.concatenate(scores)[order],
            (policy, champion),
        )

    def paths(self, policy: Policy) -> tuple[Log, Floats]:
        """Every episode that can happen, once, and the probability with which it does."""
        began = [(chance, version, [(0, 0, 0.0)], 0, True) for version, chance in enumerate(self.weights)]
        for _ in range(self.horizon):
            began = [after for path in began for after in (self._after(*path) if path[4] else [path])]
        version, who, states, actions, rewards = [], [], [], [], []
        for unit, (_, logger, steps, _, _) in enumerate(began):
            for state, action, reward in steps[1:]:
                version.append(logger)
                who.append(unit)
                states.append(state)
                actions.append(action)
                rewards.append(reward)
        scored = np.stack([each(np.array(states), self.masks[states]) for each in self.loggers], axis=1)
        log = self._log(
            np.array(version),
            np.array(who),
            np.array(states),
            np.array(actions),
            np.array(rewards),
            scored,
            (policy, None),
        )
        return log, np.array([chance for chance, *_ in began])

    def _after(
        self, chance: float, version: int, steps: list[tuple[int, int, float]], state: int, _: bool
    ) -> list[tuple[float, int, list[tuple[int, int, float]], int, bool]]:
        """All that can follow on one more step."""
        found, drawn_from = [], self.loggers[version](np.array([state]), self.masks[[state]])[0]
        for action, likely in enumerate(drawn_from):
            for reward in (self.low[state, action], self.high[state, action]):
                now = [*steps, (state, action, float(reward))]
                ended = chance * likely * 0.5 * self.ends[state, action]
                found.append((ended, version, now, state, False))
                for after, moved in enumerate(self.moves[state, action]):
                    on = chance * likely * 0.5 * (1.0 - self.ends[state, action]) * moved
                    found.append((on, version, now, after, True))
        return [each for each in found if each[0] > 0.0]

    def _log(
        self,
        version: Ints,
        who: Ints,
        states: Ints,
        action: Ints,
        rewards: Floats,
        scored: Floats,
        judged: tuple[Policy, Policy | None],
    ) -> Log:
        policy, champion = judged
        masks, episodes = self.masks[states], int(who.max()) + 1
        features = _features(states, len(self.masks))
        choices = Choices(action, policy(states, masks), scored[np.arange(len(who)), version], features)
        first = champion(states, masks).argmax(axis=1) if champion else np.full(len(who), -1)
        return Log(
            [f"episode-{i}" for i in range(episodes)],
            np.searchsorted(who, np.arange(episodes)),
            rewards,
            choices,
            first,
            scored,
            np.tile(self.weights, (len(who), 1)),
        )


def _features(states: Ints, count: int) -> Floats:
    """All but the first, so that they are not collinear with the constant."""
    return np.eye(count)[states][:, 1:]


MEANS = np.array([[0.2, 0.5, 0.8, 0.4], [0.7, 0.3, 0.1, 0.6], [0.5, 0.8, 0.4, 0.2]])
OLD = greedy(np.array([[0.0, 1.0, 0.5, 0.2], [0.3, 0.0, 0.1, 0.9], [0.0, 0.2, 0.7, 0.1]]))
OTHER = soft(np.array([[0.5, 0.5, 0.5, 0.5], [0.0, 2.0, 0.0, 2.0], [2.0, 0.0, 0.0, 0.0]]))
NEW = soft(np.array([[0.0, 0.5, 1.5, 0.2], [1.0, 0.0, -1.0, 0.8], [0.0, 1.2, 0.3, 0.0]]))
BEST = greedy(MEANS)
WORST = greedy(-MEANS)


def bandit(**changes: object) -> Bandit:
    """Two versions share the traffic; both explore."""
    settings = {"means": MEANS, "loggers": (exploring(OLD, 0.2), exploring(OTHER, 0.1)), "weights": (0.7, 0.3)}
    return Bandit(**{**settings, **changes})  # type: ignore[arg-type]


MOVES = np.array(
    [
        [[0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.6, 0.2, 0.2]],
        [[0.5, 0.4, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]],
        [[0.2, 0.6, 0.2], [0.4, 0.1, 0.5], [0.8, 0.1, 0.1]],
    ]
)
ENDS = np.array([[0.1, 0.3, 0.2], [0.05, 0.4, 0.1], [0.5, 0.1, 0.2]])
PAY = np.array([[0.3, 0.9, 0.5], [0.8, 0.2, 0.6], [0.1, 0.7, 0.4]])
STATE_MASKS = np.array([[True, True, True], [True, False, True], [True, True, True]])
DRIVER = greedy(np.array([[1.0, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.5]]))
WANDERER = soft(np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
CANDIDATE = soft(np.array([[0.5, 1.0, 0.0], [1.5, 0.0, 0.5], [0.0, 1.0, 0.5]]))


def mdp(**changes: object) -> Mdp:
    """Rewards between 0 and 1, episodes of 1 to 5 steps, two versions that explore."""
    settings = {
        "moves": MOVES,
        "ends": ENDS,
        "low": np.zeros((3, 3)),
        "high": PAY,
        "masks": STATE_MASKS,
        "horizon": 5,
        "gamma": 0.9,
        "loggers": (exploring(DRIVER, 0.4), exploring(WANDERER, 0.2)),
        "weights": (0.6, 0.4),
    }
    return Mdp(**{**settings, **changes})  # type: ignore[arg-type]
