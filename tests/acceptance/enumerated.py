"""What a decision over choices is drawn from, said once more: by listing every action, in plain Python.

Duty: design section 4 as it is written, over dictionaries of tuples of choices. It imports nothing of what it is held
against, and knows nothing of arrays, batches or Redis.
Strategy: one choice is a tuple of one. Rules are predicates on tuples, so rules over one factor and over several are
the same thing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

Action = tuple[int, ...]
Masses = dict[Action, float]


@dataclass(frozen=True)
class Forbidding:
    """A rule as the service reads it, and the actions that it forbids in a state."""

    text: str
    forbids: Callable[[Sequence[float], Action], bool]
    jointly: bool = False


@dataclass(frozen=True)
class Sparing:
    """A rule on exploration, and the actions that may be explored."""

    text: str
    spares: Callable[[Action], bool]


@dataclass(frozen=True)
class World:
    """What all rows have in common. temperature: of the head; exploring: of the exploring part, None: uniform."""

    nvec: tuple[int, ...]
    head: str
    temperature: float | None = None
    exploring: float | None = None
    forbidding: tuple[Forbidding, ...] = ()
    sparing: tuple[Sparing, ...] = ()
    mode: bool = False  # rows that do not explore answer with the mode

    @property
    def jointly(self) -> bool:
        return any(rule.jointly for rule in self.forbidding)

    @property
    def fallback(self) -> Action:
        return (1,) * len(self.nvec)

    @property
    def greedy(self) -> bool:
        return self.head == "q_values" and self.temperature is None


@dataclass(frozen=True)
class Asked:
    """One row. outputs: what its network answers, which is its state. allowed: choices for each factor, None: all."""

    outputs: tuple[float, ...]
    allowed: tuple[frozenset[int], ...] | None = None
    explore: bool = True


@dataclass(frozen=True)
class Listed:
    """The behaviour distribution. epsilon: in force. fallen: the declared fallback has all of it."""

    masses: Masses
    epsilon: float
    fallen: bool = False
    mask: frozenset[Action] = field(default_factory=frozenset)


def listed(world: World, row: Asked, epsilon: float) -> Listed:
    """List what a row is drawn from, when `epsilon` is what kill switches, callers and budgets leave."""
    fallen = Listed({world.fallback: 1.0}, 0.0, fallen=True)
    if faulty(world, row.outputs):
        return fallen
    mask = _mask(world, row)
    own = _scaled(_own(world, row.outputs, mask))
    if own is None:
        return fallen
    if world.mode and epsilon == 0.0:
        best = max(own.values())
        own = {next(action for action in mask if own.get(action) == best): 1.0}
    explorable = [action for action in mask if all(rule.spares(action) for rule in world.sparing)]
    exploring = _scaled(_exploring(world, row.outputs, explorable))
    if exploring is None:
        return Listed(own, 0.0, mask=frozenset(mask))
    masses = {a: (1.0 - epsilon) * own.get(a, 0.0) + epsilon * exploring.get(a, 0.0) for a in mask}
    return Listed(masses, epsilon, mask=frozenset(mask))


def faulty(world: World, outputs: Sequence[float]) -> bool:
    """Whether the network's answer is none that its head may give."""
    if not all(map(math.isfinite, outputs)):
        return True
    if world.head == "action":
        return any(value != int(value) or not 0 <= value < n for value, n in zip(outputs, world.nvec, strict=True))
    if world.head == "probabilities":
        return any(min(each) < 0.0 or abs(sum(each) - 1.0) > 1e-3 for each in _by_factor(world, outputs))
    return False


def marginals(world: World, masses: Masses) -> list[float]:
    """Masses of each factor's choices, factors side by side."""
    return [
        math.fsum(mass for action, mass in masses.items() if action[factor] == choice)
        for factor, n in enumerate(world.nvec)
        for choice in range(n)
    ]


def every(world: World) -> list[Action]:
    """All actions, the last factor fastest."""
    return list(product(*map(range, world.nvec)))


def _by_factor(world: World, outputs: Sequence[float]) -> list[Sequence[float]]:
    ends = [sum(world.nvec[: factor + 1]) for factor in range(len(world.nvec))]
    return [outputs[end - n : end] for end, n in zip(ends, world.nvec, strict=True)]


def _mask(world: World, row: Asked) -> list[Action]:
    def allowed(action: Action) -> bool:
        return row.allowed is None or all(a in each for a, each in zip(action, row.allowed, strict=True))

    return [
        action
        for action in every(world)
        if allowed(action) and not any(rule.forbids(row.outputs, action) for rule in world.forbidding)
    ]


def _own(world: World, outputs: Sequence[float], mask: Sequence[Action]) -> Masses:
    """The target within the mask, not yet scaled."""
    if world.head == "action":
        chosen = tuple(int(value) for value in outputs)
        return {action: float(action == chosen) for action in mask}
    if world.head == "probabilities":
        return {a: math.prod(f[c] for f, c in zip(_by_factor(world, outputs), a, strict=True)) for a in mask}
    values = {action: _value(world, outputs, action) for action in mask}
    if world.greedy:
        best = max(values.values(), default=0.0)
        first = next((action for action in mask if values[action] == best), None)
        return {action: float(action == first) for action in mask}
    return _softmax(values, world.temperature or 1.0)


def _exploring(world: World, outputs: Sequence[float], among: Sequence[Action]) -> Masses:
    if world.exploring is None:
        return dict.fromkeys(among, 1.0)
    if world.head in ("q_values", "logits"):  # of a softened head q is what its own softmax is taken of
        softened = 1.0 if world.temperature is None else world.temperature
        values = {action: _value(world, outputs, action) / softened for action in among}
    else:
        known = {action: mass for action, mass in _own(world, outputs, among).items() if mass > 0.0}
        values = {action: math.log(mass) for action, mass in known.items()}
    return _softmax(values, world.exploring)


def _value(world: World, outputs: Sequence[float], action: Action) -> float:
    return math.fsum(each[choice] for each, choice in zip(_by_factor(world, outputs), action, strict=True))


def _softmax(values: Masses, temperature: float) -> Masses:
    largest = max(values.values(), default=0.0)
    return {action: math.exp((value - largest) / temperature) for action, value in values.items()}


def _scaled(masses: Masses) -> Masses | None:
    whole = math.fsum(masses.values())
    return {action: mass / whole for action, mass in masses.items()} if whole > 0.0 else None
