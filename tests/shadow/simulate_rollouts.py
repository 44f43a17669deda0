"""Rollouts of nothing against itself, and of something worse: how often, and how soon, the tests say so.

`python -m tests.shadow.simulate_rollouts --runs 2000` prints the tables of docs/sequential-tests.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy.special import betaincinv

from policies.types import Bools, Floats
from shadow.ratio import Ratio
from shadow.sequential import Difference
from shadow.verdicts import Alpha
from tests.shadow.rivals import arms, howard, ours
from tests.shadow.worlds import KEYS, Traffic, level, routed, traffic, worse

WEIGHTS = (0.01, 0.05, 0.10, 0.25, 0.50)
ALPHA = Alpha(guards=3, steps=len(WEIGHTS))
MARGIN = 0.05
NEVER = 10**9
PORTION = 2_000


def rolled_back_by_episode(rng: np.random.Generator, units: int) -> bool:
    """Whether an A/A rollout over all steps is rolled back; episodes routed one by one, three guards, margin 0.

    With margin 0 the null holds with nothing to spare, so that this is the largest share there can be.
    """
    ramp = float(units * len(WEIGHTS))
    for step, weight in enumerate(WEIGHTS):
        times = step * units + np.arange(units, dtype=np.float64)
        if _guards_fire(routed(rng, units, weight), traffic(rng, times, ramp), weight, step):
            return True
    return False


def rolled_back_by_key(rng: np.random.Generator, units: int) -> bool:
    """The same with keys that come back in each step and stay where they were, one unit for each key and step."""
    effects, buckets = rng.normal(size=units) * 0.2, rng.random(units)
    floor = 0.0
    for step, weight in enumerate(WEIGHTS):
        keys = rng.permutation(units)
        keys = keys[buckets[keys] >= floor]  # the others were the challenger's before
        times = step * units + np.arange(len(keys), dtype=np.float64)
        moved = buckets[keys] < weight
        chance = (weight - floor) / (1.0 - floor)
        if _guards_fire(moved, traffic(rng, times, units * 5.0, keys, effects), chance, step):
            return True
        floor = weight
    return False


def _guards_fire(assigned: Bools, seen: Traffic, weight: float, step: int) -> bool:
    columns = ((0.0, 1.0, seen.values), (-1.0, 0.0, -seen.overridden), (-1.0, 0.0, -seen.slow))
    for guard, (low, high, values) in enumerate(columns):
        _, _, below = Difference.fresh(low, high, weight).watch(assigned, values, 0.0)
        if below.max() >= -np.log(ALPHA.rollback(guard, step)):
            return True
    return False


def advanced_wrongly(rng: np.random.Generator, units: int, weight: float) -> bool:
    """Whether a challenger that is worse by exactly the margin is let pass by the one guard that must prove."""
    seen = traffic(rng, np.arange(units, dtype=np.float64), float(units))
    assigned = routed(rng, units, weight)
    # Worse for certain and by the same in each unit, so that the null holds with nothing to spare.
    values = np.where(assigned, 0.05 + 0.9 * seen.values - MARGIN, 0.05 + 0.9 * seen.values)
    _, above, _ = Difference.fresh(0.0, 1.0, weight).watch(assigned, values, -MARGIN)
    return bool(above.max() >= -np.log(ALPHA.advance))


def bound_ever_wrong(rng: np.random.Generator, units: int, alpha: float) -> bool:
    """Whether one upper bound at α is ever below the truth: how much of α is used when it is not cut into shares."""
    values = level(np.arange(units, dtype=np.float64), float(units)) + 0.2 * rng.uniform(-1.0, 1.0, units)
    _, _, below = Difference.fresh(0.0, 1.0, 0.5).watch(routed(rng, units, 0.5), values, 0.0)
    return bool(below.max() >= -np.log(alpha))


def rows_of_sticky_keys(rng: np.random.Generator, units: int) -> bool:
    """Naive: each decision counts, though all of a key go one way."""
    weight, keys = 0.1, 200
    effects, mine = rng.normal(size=keys) * 0.15, rng.random(keys) < weight
    whose = rng.integers(0, keys, units)
    values = np.clip(0.5 + effects[whose] + 0.1 * rng.normal(size=units), 0.0, 1.0)
    return _fires(mine[whose], values, weight)


def as_rewards_arrive(rng: np.random.Generator, units: int) -> bool:
    """Naive: a unit counts when its reward is there; the champion's of before the step come in too."""
    return _by_arrival(rng, units, lambda seen: seen.delays)


def as_episodes_end(rng: np.random.Generator, units: int) -> bool:
    """Naive: a unit counts when it has ended; the better it goes, the longer it lasts."""
    return _by_arrival(rng, units, lambda seen: np.multiply(seen.lengths, 20.0))


def _by_arrival(rng: np.random.Generator, units: int, wait: Callable[[Traffic], Floats]) -> bool:
    weight = 0.25
    times = np.arange(-units, units, dtype=np.float64)
    seen = traffic(rng, times, float(units))
    assigned = routed(rng, 2 * units, weight) & (times >= 0.0)
    arrivals = times + wait(seen)
    order = np.argsort(arrivals)
    order = order[(arrivals[order] >= 0.0) & (arrivals[order] < units)]
    return _fires(assigned[order], seen.values[order], weight)


def pooled_ramp(rng: np.random.Generator, units: int) -> bool:
    """Naive: one mean for each version over all steps, while the level falls; each with a confidence sequence."""
    times = np.arange(units, dtype=np.float64)
    weights = np.repeat(WEIGHTS, -(-units // len(WEIGHTS)))[:units]
    seen = traffic(rng, times, float(units))
    assigned = rng.random(units) < weights
    return bool(arms(~assigned, seen.values, 0.0, 0.01).any())


def _fires(assigned: Bools, values: Floats, weight: float) -> bool:
    _, _, below = Difference.fresh(0.0, 1.0, weight).watch(assigned, values, 0.0)
    return bool(below.max() >= -np.log(0.01))


def units_to_roll_back(rng: np.random.Generator, weight: float, effect: float, cap: int) -> int:
    """Units until a challenger that is worse by `-effect` more than the margin is rolled back."""
    assigned, values = _differing(rng, weight, effect, cap)
    return crossing(assigned, values, weight, 0.0, above=False, alpha=ALPHA.rollback(0, 0))


def units_to_advance(rng: np.random.Generator, weight: float, room: float, cap: int) -> int:
    """Units until a challenger as good as the champion has proven to be above a margin of `room`."""
    assigned, values = _differing(rng, weight, 0.0, cap)
    return crossing(assigned, values, weight, -room, above=True, alpha=ALPHA.advance)


def units_in_a_range(rng: np.random.Generator, weight: float, width: float, cap: int) -> int:
    """`units_to_advance` where the range was declared `width` times as wide as the values need."""
    assigned, values = _differing(rng, weight, 0.0, cap)
    middle = 0.5 + (values - 0.5) / width
    return crossing(assigned, middle, weight, -MARGIN / width, above=True, alpha=ALPHA.advance)


def units_of_overrides(rng: np.random.Generator, weight: float, rate: float, cap: int) -> int:
    """Units of ten decisions until an override rate of `rate` is found worse than one of 1 % by more than 0.5 %."""
    assigned = routed(rng, cap, weight)
    shares = rng.binomial(10, np.where(assigned, rate, 0.01)) / 10.0
    return crossing(assigned, 1.0 - shares, weight, -0.005, above=False, alpha=ALPHA.rollback(1, 0))


def units_of_mismatch(rng: np.random.Generator, weight: float, lost: float, cap: int) -> int:
    """Assignments until it shows that a share `lost` of the challenger's units never arrives."""
    assigned = routed(rng, cap, weight)
    kept = assigned[~(assigned & (rng.random(cap) < lost))]
    challengers = np.cumsum(kept)
    for at in np.unique(np.geomspace(1, len(kept), 400).astype(int)):
        if Ratio(weight, int(challengers[at - 1]), int(at - challengers[at - 1])).mismatched(ALPHA.rollback(2, 0)):
            return int(at)
    return NEVER


def _differing(rng: np.random.Generator, weight: float, effect: float, cap: int) -> tuple[Bools, Floats]:
    seen = traffic(rng, np.arange(cap, dtype=np.float64), float(cap))
    assigned = routed(rng, cap, weight)
    return assigned, np.where(assigned, worse(rng, seen, effect), seen.values)


def crossing(assigned: Bools, values: Floats, weight: float, delta: float, *, above: bool, alpha: float) -> int:
    """Units until the evidence that the difference is above (or below) `delta` is enough; NEVER."""
    state = Difference.fresh(0.0, 1.0, weight)
    for start in range(0, len(values), PORTION):
        part = slice(start, start + PORTION)
        state, over, under = state.watch(assigned[part], values[part], delta)
        found = first((over if above else under) >= -np.log(alpha))
        if found < NEVER:
            return start + found
    return NEVER


def first(reached: Bools) -> int:
    """Units until it was true; NEVER."""
    return int(np.argmax(reached)) + 1 if reached.any() else NEVER


def share_of(runs: int, seed: int, happens: Callable[[np.random.Generator], bool]) -> tuple[int, float, float]:
    """In how many runs it happened, and the probability's 95 % interval (Clopper and Pearson 1934)."""
    count = sum(happens(np.random.default_rng([seed, run])) for run in range(runs))
    low = float(betaincinv(count, runs - count + 1, 0.025)) if count else 0.0
    high = float(betaincinv(count + 1, runs - count, 0.975)) if count < runs else 1.0
    return count, low, high


def median_of(runs: int, seed: int, cap: int, needed: Callable[[np.random.Generator, int], int]) -> str:
    """The median of what is needed, two digits; more than `cap` where it is."""
    middle = float(np.median([needed(np.random.default_rng([seed, run]), cap) for run in range(runs)]))
    return f"> {cap:,}" if middle > cap else f"{float(f'{middle:.2g}'):,.0f}"


def cap_for(weight: float, gap: float) -> int:
    """Units after which one need not wait any more."""
    return int(min(300_000, 2_000 + 2.0 / (weight * gap * gap)))


def show_shares(runs: int) -> None:
    _say("| what | α | runs | happened | probability, 95 % interval |\n|---|---|---|---|---|")
    rows: list[tuple[str, int, int, Callable[[np.random.Generator], bool]]] = [
        ("A/A over five steps, episodes: rolled back", 1, runs, lambda rng: rolled_back_by_episode(rng, 2_000)),
        ("A/A over five steps, keys that come back: rolled back", 1, runs, lambda rng: rolled_back_by_key(rng, 2_000)),
    ]
    for weight in (0.01, 0.1, 0.5):
        text = f"worse by exactly the margin, {weight:.0%} step: advanced"
        rows.append((text, 1, runs, partial(advanced_wrongly, units=3_000, weight=weight)))
    few = max(runs // 10, 10)
    rows.append(
        ("one upper bound, 50% step: ever below the truth", 20, few, lambda rng: bound_ever_wrong(rng, 5_000, 0.2))
    )
    rows += [
        ("naive, A/A: decisions of sticky keys, not units", 1, few, lambda rng: rows_of_sticky_keys(rng, 5_000)),
        ("naive, A/A: in the order in which rewards arrive", 1, few, lambda rng: as_rewards_arrive(rng, 5_000)),
        ("naive, A/A: as episodes end", 1, few, lambda rng: as_episodes_end(rng, 5_000)),
        ("naive, A/A: steps pooled while the level falls", 1, few, lambda rng: pooled_ramp(rng, 10_000)),
    ]
    for seed, (text, alpha, times, happens) in enumerate(rows):
        count, low, high = share_of(times, seed, happens)
        _say(f"| {text} | {alpha} % | {times:,} | {count:,} | {low:.2%} to {high:.2%} |")


def show_medians(runs: int) -> None:
    gaps = (0.02, 0.05, 0.1, 0.2)
    _table(
        "units until rolled back, worse than -margin by",
        [f"{gap:.2f}" for gap in gaps],
        lambda w, i: median_of(
            runs, 100, cap_for(w, gaps[i]), lambda rng, cap: units_to_roll_back(rng, w, -gaps[i], cap)
        ),
    )
    _table(
        "units until advanced, better than -margin by",
        [f"{gap:.2f}" for gap in gaps],
        lambda w, i: median_of(runs, 200, cap_for(w, gaps[i]), lambda rng, cap: units_to_advance(rng, w, gaps[i], cap)),
    )
    widths = (1, 2, 10)
    _table(
        f"units until advanced, margin {MARGIN:.2f}, in a range as wide as the values need, times",
        [f"{width}" for width in widths],
        lambda w, i: median_of(runs, 600, 300_000, lambda rng, cap: units_in_a_range(rng, w, widths[i], cap)),
    )
    rates = (0.02, 0.05, 0.2)
    _table(
        "units until rolled back, overrides 1 % ->",
        [f"{rate:.0%}" for rate in rates],
        lambda w, i: median_of(runs, 300, 200_000, lambda rng, cap: units_of_overrides(rng, w, rates[i], cap)),
    )
    losses = (0.1, 0.3, 0.5)
    _table(
        "assignments until the ratio shows, of the challenger's units lost",
        [f"{lost:.0%}" for lost in losses],
        lambda w, i: median_of(runs, 400, 300_000, lambda rng, cap: units_of_mismatch(rng, w, losses[i], cap)),
    )


def show_rivals(runs: int) -> None:
    """Units until advanced, as good as the champion, by three tests."""

    def needed(weight: float, at: int) -> str:
        def one(rng: np.random.Generator, cap: int) -> int:
            assigned, values = _differing(rng, weight, 0.0, cap)
            tests: tuple[Callable[[], Bools], ...] = (
                lambda: ours(assigned, values, -MARGIN, weight) >= np.log(100.0),
                lambda: howard(assigned, values, -MARGIN, weight) >= np.log(100.0),
                lambda: arms(assigned, values, -MARGIN, 0.01),
            )
            return first(tests[at]())

        return median_of(runs, 500, cap_for(weight, MARGIN), one)

    names = ["this one", "empirical Bernstein", "a betting sequence each"]
    _table(f"units until advanced, margin {MARGIN:.2f}, as good", names, needed)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _table(title: str, columns: Sequence[str], cell: Callable[[float, int], str]) -> None:
    _say(f"\n| {title} | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for weight in WEIGHTS:
        _say(f"| {weight:.0%} | " + " | ".join(cell(weight, i) for i in range(len(columns))) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2_000, help="A/A rollouts; medians are of a fortieth of it")
    parser.add_argument("--only", choices=["shares", "medians", "rivals"])
    asked = parser.parse_args()
    few = max(asked.runs // 40, 5)
    for name, show, runs in (
        ("shares", show_shares, asked.runs),
        ("medians", show_medians, few),
        ("rivals", show_rivals, few),
    ):
        if asked.only in (None, name):
            show(runs)
    _say(f"\n({KEYS} keys; α = {ALPHA.total:.0%} over {ALPHA.guards} guards and {ALPHA.steps} steps)")


if __name__ == "__main__":
    main()
