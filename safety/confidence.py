"""`confidence`: rows where the version is unsure are answered by another. Pure, total.

With several factors the gap is that of the closest, and the entropy the sum over them: they are independent. A row
whose network gave no answer is none of this rule's. Where a question has no answer, entropy of values that are no
distribution, a point that has no scores, every row is unsure: what cannot be evaluated denies.
"""

from __future__ import annotations

import numpy as np

from policies.errors import SafetyError
from policies.types import ActionSpec, Bools, Box, Choices, Floats, columns
from safety.facts import Facts, Replaced
from safety.rules import Confidence


class ConfidenceEvaluator:
    """One `confidence` rule, bound to a space of choices."""

    joint = False

    def __init__(self, rule: Confidence, action: ActionSpec) -> None:
        """Bind. Raises SafetyError naming the field."""
        if isinstance(action, Box):
            raise SafetyError("a continuous action has no scores to be sure of", "kind")
        if rule.min_gap is None and rule.max_entropy is None:
            raise SafetyError("say min_gap, max_entropy, or both", "min_gap")
        self._name = rule.name
        self._min_gap, self._max_entropy = rule.min_gap, rule.max_entropy
        self._space: Choices = action

    def judge(self, facts: Facts) -> Replaced:
        unsure = np.zeros(len(facts.states), dtype=np.bool_)
        if facts.scores is None:
            return Replaced(self._name, ~unsure)
        if self._min_gap is not None:
            unsure |= ~(gap(facts.scores, self._space.nvec) >= self._min_gap)
        if self._max_entropy is not None:
            unsure |= self._uncertain(facts.scores, self._max_entropy, facts.greedy)
        return Replaced(self._name, unsure & ~facts.faulty)

    def _uncertain(self, scores: Floats, limit: float, greedy: bool) -> Bools:
        if greedy:
            return np.ones(len(scores), dtype=np.bool_)
        return np.asarray(~(entropy(scores) <= limit))


def gap(scores: Floats, nvec: tuple[int, ...]) -> Floats:
    """Between the two best scores, over all choices of a factor; the smallest over factors, float64 [B]."""
    smallest = np.full(len(scores), np.inf)
    for part in columns(nvec):
        if part.stop - part.start > 1:
            best = np.partition(scores[:, part], -2, axis=1)
            with np.errstate(invalid="ignore"):
                smallest = np.minimum(smallest, best[:, -1] - best[:, -2])
    return smallest


def entropy(probabilities: Floats) -> Floats:
    """-Σ p log p in nats, float64 [B]; over factors side by side it is the sum of theirs."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(probabilities > 0.0, np.log(probabilities), 0.0)
        return np.asarray(-(probabilities * logs).sum(axis=1))
