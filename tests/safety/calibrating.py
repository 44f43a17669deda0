"""Logs whose true ε is a multiple of the recorded one, and when the monitor would have noticed, looking after each
decision. `python -m tests.safety.calibrating` prints the figures of docs/calibration.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np

from policies.draw import draw
from policies.explore import behave
from policies.heads import target
from policies.types import Bools, Floats, HeadKind
from safety.calibration import LOG_WEIGHTS, TILTS, Bin, Tosses
from safety.calibration_choices import TRACKED, Choices, Tracked, bins, toss

DECISIONS = 5_000
WINDOW = 5_000
ALPHA = 0.05


def logged(
    rng: np.random.Generator,
    n: int,
    epsilon: float,
    factor: float = 1.0,
    head: HeadKind = "q_values",
    masked: bool = True,
) -> Choices:
    """Decisions recorded as drawn with `epsilon`, but drawn with `factor` times it, by the service's own functions."""
    outputs = rng.normal(size=(DECISIONS, n)) * 2.0
    mask = rng.random((DECISIONS, n)) < 0.9 if masked else np.ones((DECISIONS, n), np.bool_)
    mask[np.arange(DECISIONS), rng.integers(0, n, DECISIONS)] = True
    wanted = target(outputs, head)
    said, fallback = np.full(DECISIONS, epsilon), np.zeros(DECISIONS, np.int64)
    recorded = behave(wanted, mask, said, fallback)
    drawn = draw(behave(wanted, mask, factor * said, fallback), rng.random((DECISIONS, 2)))
    propensities = recorded.probabilities[np.arange(DECISIONS), drawn.actions[:, 0]]
    return Choices(recorded.probabilities, drawn.actions, said, drawn.explored, propensities, (n,))


def tossed(choices: Choices) -> tuple[Tosses, tuple[Bin, ...]]:
    """All decisions as one batch, or as two where the tracked actions are chosen on the way."""
    n = choices.behaviour.shape[1]
    tracked = Tracked.of(n)
    if n > TRACKED:
        _, tracked = toss(choices, tracked)  # which they are does not depend on what was drawn
    tosses, tracked = toss(choices, tracked)
    return tosses, bins(tracked, n)


def first_alarm(tosses: Tosses, names: Sequence[Bin], groups: Sequence[str], alpha: float = ALPHA) -> int | None:
    """The number of decisions after which one of the groups' bins is over its threshold; by definition, bin by bin."""
    first = None
    count = len({each.group for each in names})
    for at, each in enumerate(names):
        if each.group in groups and tosses.masses[:, at].any():
            share = alpha / 2.0 / (count * sum(other.group == each.group for other in names))
            over = np.flatnonzero(_evidence(tosses.masses[:, at], tosses.hits[:, at]) >= np.log(1.0 / share))
            if len(over) and (first is None or over[0] + 1 < first):
                first = int(over[0]) + 1
    return first


def _evidence(masses: Floats, hits: Bools) -> Floats:
    exponents = np.cumsum(hits)[:, None] * TILTS - np.cumsum(np.log1p(masses[:, None] * np.expm1(TILTS)), axis=0)
    return np.asarray(np.log((np.exp(np.minimum(LOG_WEIGHTS + exponents, 500.0))).sum(axis=1)))


def normal_mixture_crossing(p: float, rho: float, alpha: float, decisions: int) -> float:
    """Probability that |S| of honest tosses of probability p ever exceeds √((V+ρ)·ln((V+ρ)/(ρα²))); exact, by
    following the distribution of the number of hits.
    """
    hits = np.arange(int(p * decisions + 12.0 * np.sqrt(p * decisions) + 40.0))
    alive, gone = np.zeros(len(hits)), 0.0
    alive[0] = 1.0
    for done in range(1, decisions + 1):
        alive[1:] = alive[1:] * (1.0 - p) + alive[:-1] * p
        alive[0] *= 1.0 - p
        v = done * p * (1.0 - p)
        over = np.abs(hits - p * done) > np.sqrt((v + rho) * np.log((v + rho) / (rho * alpha**2)))
        gone += float(alive[over].sum())
        alive[over] = 0.0
    return gone


SETTINGS: tuple[tuple[HeadKind, int, float], ...] = (
    ("q_values", 2, 0.05),
    ("q_values", 8, 0.05),
    ("logits", 4, 0.05),
    ("q_values", 2, 0.01),
    ("q_values", 8, 0.01),
    ("q_values", 100, 0.01),
)
EVERYTHING = ("explored", "probability", "action")


def figures(runs: int, honest_runs: int) -> Iterator[str]:
    """The tables of docs/calibration.md."""
    yield "| head | actions | logged ε | honest runs alarmed | 2ε: alarmed | median | latest | without `explored` |"
    yield "|---|---|---|---|---|---|---|---|"
    for head, n, epsilon in SETTINGS:
        rng = np.random.default_rng([n, round(epsilon * 1000)])
        false = sum(
            first_alarm(*tossed(logged(rng, n, epsilon, 1.0, head)), EVERYTHING) is not None for _ in range(honest_runs)
        )
        wrong = [tossed(logged(rng, n, epsilon, 2.0, head)) for _ in range(runs)]
        found = [at for each in wrong if (at := first_alarm(*each, EVERYTHING)) is not None]
        blind = sum(first_alarm(*each, EVERYTHING[1:]) is not None for each in wrong)
        yield (
            f"| `{head}` | {n} | {epsilon:g} | {false} of {honest_runs} | {len(found)} of {runs} "
            f"| {int(np.median(found))} | {max(found)} | {blind} of {runs} |"
        )
    yield ""
    yield "| α of the bin | ρ | p | probability of a false alarm ÷ α |"
    yield "|---|---|---|---|"
    for alpha in (0.05, 0.0005):
        for rho in (0.1, 1.0, 10.0):
            ratio = normal_mixture_crossing(0.001, rho, alpha, 50_000) / alpha
            yield f"| {alpha:g} | {rho:g} | 0.001 | {ratio:.1f} |"


if __name__ == "__main__":
    for line in figures(200, 400):
        sys.stdout.write(line + "\n")
