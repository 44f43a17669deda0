"""Do both versions get the units that routing meant to give them? A sequential test of the sample ratio. Pure.

Duty: say whether newly assigned units are independent tosses of the step's weight. It knows nothing of their values.
Strategy: the Bayes factor of "some other share, drawn from a Beta around w" against "w", which is a martingale if w is
true: B(a + n1, b + n0) / B(a, b) / (w^n1 · (1 - w)^n0) with a = κw, b = κ(1 - w) (Lindon and Malek 2022, "Anytime-valid
inference for multinomial count data", the Dirichlet mixture for two categories; Robbins 1970).
Promise: the evidence reaches log(1/α) at any time ever with probability α at most, if the tosses are true.
Count a unit when it is assigned, not when it is ripe: a version that loses units on the way is what this is about.
"""

from __future__ import annotations

from math import lgamma, log

import msgspec

CERTAINTY = 10.0  # units of the rarer version that the prior is worth: other shares are expected within a third of w


class Ratio(msgspec.Struct, frozen=True):
    """How many units each version was given in a step of this weight."""

    weight: float  # probability with which a unit is assigned to the challenger, in (0, 1)
    challengers: int = 0
    champions: int = 0

    def add(self, assigned: bool) -> Ratio:
        """Count a newly assigned unit."""
        return self.add_many(int(assigned), int(not assigned))

    def add_many(self, challengers: int, champions: int) -> Ratio:
        """Count newly assigned units; their order does not matter."""
        return Ratio(self.weight, self.challengers + challengers, self.champions + champions)

    @property
    def share(self) -> float:
        """The challenger's share of units; the weight, as long as there are none."""
        units = self.challengers + self.champions
        return self.challengers / units if units else self.weight

    @property
    def evidence(self) -> float:
        """Nats against the weight; may be negative."""
        size = CERTAINTY / min(self.weight, 1.0 - self.weight)
        a, b = size * self.weight, size * (1.0 - self.weight)
        likelihood = self.challengers * log(self.weight) + self.champions * log(1.0 - self.weight)
        return _log_beta(a + self.challengers, b + self.champions) - _log_beta(a, b) - likelihood

    def mismatched(self, alpha: float) -> bool:
        return self.evidence >= log(1.0 / alpha)


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
