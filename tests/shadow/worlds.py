"""Made-up traffic for rollouts: what each unit would be worth, who it belongs to, and when one gets to know.

Nothing here is stationary or independent: keys differ for good, the level drifts, a bad episode is short and its reward
comes early, and a few units lose nearly everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.types import Bools, Floats, Ints

KEYS = 500
KEY_SPREAD = 0.08
DAY = 3_000.0  # units
FALL = 0.15  # of the range, over a ramp


@dataclass(frozen=True, slots=True)
class Traffic:
    """N units in the order in which they started, as they are under the champion.

    values: float64 [N], fractions of the range. keys: int64 [N]. lengths: int64 [N], decisions. overridden, slow:
    float64 [N], shares of the decisions. delays: float64 [N], from the start to the last reward, in units' starts.
    """

    values: Floats
    keys: Ints
    lengths: Ints
    overridden: Floats
    slow: Floats
    delays: Floats


def level(times: Floats, ramp: float) -> Floats:
    """What a unit is worth at a time, but for its key and chance: a daily wave, and a fall during the ramp."""
    fallen = np.clip(times / ramp, 0.0, 1.0)
    return np.asarray(0.6 - FALL * fallen + 0.05 * np.sin(2.0 * np.pi * times / DAY))


def traffic(
    rng: np.random.Generator, times: Floats, ramp: float, keys: Ints | None = None, effects: Floats | None = None
) -> Traffic:
    """Units that start at these times. keys, effects: whose they are, and how the keys differ; drawn if not given."""
    n = len(times)
    effects = rng.normal(size=KEYS) * KEY_SPREAD if effects is None else effects
    keys = np.minimum((rng.pareto(1.0, n) * 20.0).astype(np.int64), KEYS - 1) if keys is None else keys
    values = level(times, ramp) + effects[keys] + 0.12 * rng.normal(size=n)
    bad = rng.random(n) < 0.02
    values = np.clip(np.where(bad, 0.1 * rng.random(n), values), 0.0, 1.0)
    lengths = 1 + rng.geometric(1.0 / (1.0 + 30.0 * values))
    clumsy = np.clip(0.02 + 0.2 * effects[keys], 0.0, 1.0)
    return Traffic(
        values=values,
        keys=keys,
        lengths=lengths,
        overridden=rng.binomial(lengths, clumsy) / lengths,
        slow=rng.binomial(lengths, 0.01, n) / lengths,
        delays=rng.exponential(1.0, n) * 1_500.0 * values**2,
    )


def worse(rng: np.random.Generator, traffic_: Traffic, effect: float) -> Floats:
    """The units' values under a challenger whose mean is higher by `effect`, float64 [N].

    A share of the units ends at one end of the range, the others move little: the tail is where it differs.
    """
    values = traffic_.values
    end = 0.0 if effect < 0.0 else 1.0
    share = effect / (end - values.mean())
    return np.where(rng.random(len(values)) < share, end, values)


def routed(rng: np.random.Generator, n: int, weight: float) -> Bools:
    return rng.random(n) < weight
